"""Golden GGUF files: what llama.cpp's own converter makes of tiny checkpoints, and the logits llama.cpp has for them.

    pip install llama-cpp-python==0.3.36                   # beside requirements-peers.txt
    tar xf llama_cpp_python-0.3.36.tar.gz                  # its source archive, which holds the converter
    python tests/golden/make_gguf.py llama_cpp_python-0.3.36/vendor/llama.cpp

Writes tests/golden/gguf: checkpoints that are as llama.cpp wants their families (the others are those of `families`);
`expected.json`, of the converter's files the metadata, and of each tensor type, shape and hash; of our own file its
metadata ("export") and in `logits.safetensors` what llama.cpp computes with it; `tokenizers.json`, which text llama.cpp
cuts into which tokens.
"""

import hashlib
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import llama_cpp
import make_families as families
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
DROPPED = families.DROPPED
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 32.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": True,
        "original_max_position_embeddings": 64}  # fmt: skip
CHECKPOINTS = {  # as in make_families.py
    # The converter does not say which layers slide: five of six, as always.
    "gemma3": ("gemma3_text", {"pad_token_id": None, "num_hidden_layers": 7, "head_dim": 12, "sliding_window": 6,
                               "intermediate_size": 16, "query_pre_attn_scalar": 12},
               {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 6,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "tie_word_embeddings": DROPPED}),
    # These two the converter gets wrong: it writes no pattern of sliding layers, and a factor that llama.cpp overrides.
    "gemma3_pattern": ("gemma3_text", {"pad_token_id": None, "num_hidden_layers": 3, "head_dim": 16,
                                       "sliding_window": 5, "query_pre_attn_scalar": 16, "intermediate_size": 16,
                                       "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, None),
    "qwen3_yarn_factor": ("qwen3", {"head_dim": 12, "rope_parameters": {**YARN, "attention_factor": 1.7}}, None),
    "qwen3_yarn": ("qwen3", {"head_dim": 12, "rope_parameters": YARN}, None),
    "smollm3": ("smollm3", {"pad_token_id": None, "num_hidden_layers": 4, "tie_word_embeddings": False}, None),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 12,
                            "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
                            "rope_parameters": YARN}, None),
    "llama4": ("llama4_text", {"num_local_experts": 4, "intermediate_size": 8, "intermediate_size_mlp": 24,
                               "num_hidden_layers": 4, "head_dim": 8, "interleave_moe_layer_step": 2},
               {"rope_theta": 500.0, "rope_scaling": families.moe.SCOUT, "no_rope_layers": [],
                "moe_layers": DROPPED, "no_rope_layer_interval": DROPPED}),
}  # fmt: skip
OF_FAMILIES = (
    "granite_bias", "granite_hub", "llama3_scaling_hub", "llama_linear_hub", "llama_tied_bias", "mistral_hub",
    "mixtral_hub", "phi3_partial_hub", "qwen2_hub", "qwen3_tied", "qwen3_moe_hub", "gpt_oss_mxfp4",
)  # fmt: skip
TYPES = ("f16", "bf16", "q8_0")
# How tokenizer.json files of the hub cut text, by llama.cpp's name for it: the expression and whether merges are
# ignored for whole words (None: GPT-2's own expression, which ByteLevel has).
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    "gpt-2": (None, False),
    "smollm": (None, False),  # after digits, one by one
    "llama-bpe": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST, True),
    "smaug-bpe": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST, False),
    "qwen2": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST, False),
    "tekken": (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}"
               r"\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+", True),
    "gpt-4o": (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|"
               r"'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|"
               r"'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", False),
}  # fmt: skip
TEXTS = [
    "", " ", "a",
    " Hello  world,\n\n\tit's 12345.67 in THE HTTPServer/path//\n\n  We'Ve a'lL 3 33 333 3333 33333 dogs.  \n",
    "École nationale, нещо на Български: 我想在apple工作1314151天～ ------=======  \"\"\"\" !!!??? I'm you're",
    "\n \n\n \t\t x\r\n 🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 def f(x):\n\treturn x+1  # ok <|end|> a<|end|>b",
]  # fmt: skip


def main(source: Path, golden: Path):
    shutil.rmtree(golden / "gguf", ignore_errors=True)
    (golden / "gguf").mkdir()
    write_tokenizer(golden / "gguf")
    converter = Converter(source)
    write_tokenizations(golden / "gguf" / "tokenizers.json")
    expected, logits = {}, {}
    for name in (*CHECKPOINTS, *OF_FAMILIES):
        folder = golden / ("gguf" if name in CHECKPOINTS else "families") / name
        if name in CHECKPOINTS:
            kind, options, hub_form = CHECKPOINTS[name]
            families.save_random_model(folder, families.make_config(kind, options), seed=len(name))
            if hub_form is not None:
                families.rewrite_config(folder / "config.json", hub_form)
        with tempfile.TemporaryDirectory() as work:
            files = {kind: converter.convert(folder, golden / "gguf", Path(work), kind) for kind in TYPES}
            expected[name] = {
                "metadata": metadata(files["f16"]),
                **{kind: hashes(file) for kind, file in files.items()},
            }
            own = export(folder, golden / "gguf", Path(work))
            expected[name]["export"] = {k: v for k, v in metadata(own).items() if not k.startswith("tokenizer.")}
            logits[name] = llama_logits(own)
        print(name, len(expected[name]["f16"]), "tensors, logits", tuple(logits[name].shape))
    lines = (f"{json.dumps(name)}: {json.dumps(record, ensure_ascii=False)}" for name, record in expected.items())
    (golden / "gguf" / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    save_file(logits, golden / "gguf" / "logits.safetensors")


def write_tokenizer(folder: Path):
    """A byte-level one of 64 tokens, as many as the checkpoints' embeddings have rows."""
    tokens = ["<|endoftext|>", "<|user|>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456Ġ", "th", "the"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    record = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(record) + "\n")


def write_tokenizations(file: Path):
    """One vocabulary whose merges care for no word, so that it shows where text is cut, with every way to cut; and
    sentencepiece's kind, with and without the space that it puts before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([part for text in TEXTS for part in (text, text[1:], text[::2], text[7:])], trainer)
    record, found = json.loads(tokenizer.to_str()), {}
    for name, (expression, ignores_merges) in CUTS.items():
        steps = [] if expression is None else [pre_tokenizers.Split(Regex(expression), "isolated")]
        steps += [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
        )
        cut = json.loads(tokenizer.to_str())["pre_tokenizer"]
        merges = [" ".join(merge) for merge in record["model"]["merges"]]
        tokens = sorted(record["model"]["vocab"], key=record["model"]["vocab"].get)
        values = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": merges,
                  "token_type": [3] + [1] * (len(tokens) - 1)}  # fmt: skip
        found[name] = {"pre_tokenizer": cut, "ignore_merges": ignores_merges, "ids": llama_ids(values)}
    text = json.dumps({"texts": TEXTS, "tokenizer": record, "cuts": found, "pieces": pieces()}, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def pieces() -> dict:
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # in training alone
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)])
    tokenizer.train_from_iterator([TEXTS[3], TEXTS[4]] * 3, trainer)
    record = json.loads(tokenizer.to_str())
    record["pre_tokenizer"] = None
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] in special]
    tokens = sorted(record["model"]["vocab"], key=record["model"]["vocab"].get)
    # As sentencepiece's training numbers them: pieces in the order in which they were made.
    made = {}
    for left, right in record["model"]["merges"]:
        made.setdefault(left + right, -float(len(made)))
    values = {"model": "llama", "pre": "default", "tokens": tokens,
              "scores": [made.get(token, -1000.0) for token in tokens],
              "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)}  # fmt: skip
    ids = {str(adds): llama_ids({**values, "add_space_prefix": adds}) for adds in (False, True)}
    return {"tokenizer": record, "ids": ids}


def llama_ids(values: dict) -> list[list[int]]:
    """llama.cpp's ids of TEXTS."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as work:
        writer = GGUFWriter(file := Path(work) / "vocabulary.gguf", "llama")
        for key, value in values.items():
            add = {str: writer.add_string, bool: writer.add_bool, list: writer.add_array}[type(value)]
            add(f"tokenizer.ggml.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS]


class Converter:
    """llama.cpp's, in this process; every family with the one tokenizer, which it does not know by its hash."""

    def __init__(self, source: Path):
        self.script = source / "convert_hf_to_gguf.py"
        sys.path[:0] = [str(path) for path in (source, source / "gguf-py", ROOT, ROOT / "kernels")]

    def convert(self, checkpoint: Path, tokenizer: Path, work: Path, kind: str) -> Path:
        from conversion import get_model_class
        from conversion.base import ModelBase, TextModel

        folder, out = work / "model", work / f"{kind}.gguf"
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected.safetensors"))
        for file in TOKENIZER:
            shutil.copy(tokenizer / file, folder)
        architecture = ModelBase.load_hparams(folder, False)["architectures"][0]
        model = get_model_class(architecture, mmproj=False)
        model.set_vocab = TextModel._set_vocab_gpt2
        TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        sys.argv = [str(self.script), str(folder), "--outfile", str(out), "--outtype", kind]
        runpy.run_path(str(self.script), run_name="__main__")
        return out


def export(checkpoint: Path, tokenizer: Path, work: Path) -> Path:
    """Our own file, of an adapter that adds nothing."""
    import mini_forge
    from mini_forge.export.gguf_file import export_gguf
    from mini_forge.io.adapters import save_adapter
    from mini_forge.model.lora import LoraSpec, inject

    model, spec = mini_forge.load_model(checkpoint), LoraSpec(2, 4, targets=("o_proj",))
    inject(model, spec)
    (work / "run").mkdir()
    for file in TOKENIZER:
        shutil.copy(tokenizer / file, work / "run")
    save_adapter(work / "run", model, spec, str(checkpoint))
    export_gguf(work / "run", work / "own.gguf")
    return work / "own.gguf"


def metadata(file: Path) -> dict:
    from gguf import GGUFReader  # the source's own, which `Converter` has put on the path

    fields = GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def hashes(file: Path) -> dict:
    """Of each tensor type, shape and the SHA-256 of its data (16 digits of it)."""
    from gguf import GGUFReader

    return {
        t.name: [t.tensor_type.name.lower(), [int(n) for n in reversed(t.shape)],
                 hashlib.sha256(np.ascontiguousarray(t.data)).hexdigest()[:16]]
        for t in GGUFReader(file).tensors
    }  # fmt: skip


def llama_logits(file: Path) -> torch.Tensor:
    """(24, V) float32 of the first 24 ids of `families` (torch's seed 7), keys and values kept in float32."""
    generator = torch.Generator().manual_seed(7)
    model = llama_cpp.Llama(str(file), n_ctx=256, n_batch=256, logits_all=True, verbose=False, swa_full=True,
                            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # fmt: skip
    ids = torch.randint(0, model.n_vocab(), (2, 24), generator=generator)[0]
    model.eval(ids.tolist())
    return torch.from_numpy(np.array(model.scores[:24], dtype=np.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
