"""GGUF: what llama.cpp's own converter writes, byte for byte; its logits and tokens; merged weights; errors."""

import copy
import hashlib
import json
import shutil
import sys
from dataclasses import fields

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

import mini_forge
from mini_forge.cli import main
from mini_forge.data.tokenizer import load_tokenizer
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.export import TYPES
from mini_forge.export.architectures import ARCHITECTURES, problems
from mini_forge.export.gguf_file import export_gguf
from mini_forge.export.vocabulary import vocabulary
from mini_forge.io.adapters import save_adapter
from mini_forge.model.decoder import DecoderSpec, ExpertsSpec, LayerSpec
from mini_forge.model.families import MODULES
from mini_forge.model.lora import LoraSpec, inject, lora_layers, merge
from tests.golden_files import GOLDEN

EXPECTED = json.loads((GOLDEN / "gguf" / "expected.json").read_text(encoding="utf-8"))
LOGITS = load_file(GOLDEN / "gguf" / "logits.safetensors")
TOKENIZERS = json.loads((GOLDEN / "gguf" / "tokenizers.json").read_text(encoding="utf-8"))
BYTES = TOKENIZERS["tokenizer"] | {"pre_tokenizer": TOKENIZERS["cuts"]["gpt-2"]["pre_tokenizer"]}
PIECES = TOKENIZERS["pieces"]["tokenizer"]
INEXACT = "gpt_oss_mxfp4"  # llama.cpp multiplies MXFP4 by activations of 8 bits, and rounds this model's YaRN


def checkpoint(name):
    folder = GOLDEN / "gguf" / name
    return folder if folder.exists() else GOLDEN / "families" / name


def write_run(run, folder, targets=("o_proj",), size=0.0):
    """An adapter of `folder` whose updates are random, or nothing at all, with the tokenizer of the golden files.
    Returns the adapted model."""
    model = mini_forge.load_model(folder)
    spec = LoraSpec(2, 4, targets=targets)
    inject(model, spec)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):
        layer.lora_A.data.normal_(std=0.1, generator=generator)
        layer.lora_B.data.normal_(std=size, generator=generator)
    run.mkdir(parents=True)
    save_adapter(run, model, spec, str(folder))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "gguf" / file, run)
    return model


def read(file):
    """Metadata by key, and of each tensor type, shape and data."""
    reader = gguf.GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: (t.tensor_type.name.lower(), [int(n) for n in reversed(t.shape)], t.data) for t in reader.tensors
    }
    return metadata, tensors


def dense(tensor):
    """The numbers of a tensor as read, float32."""
    kind, shape, data = tensor
    numbers = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).view(shape)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_what_llama_cpps_converter_writes(name, kind, tmp_path):
    write_run(tmp_path / "run", checkpoint(name))
    export_gguf(tmp_path / "run", tmp_path / "out.gguf", kind)
    metadata, tensors = read(tmp_path / "out.gguf")
    found = {n: [kind, shape, hashlib.sha256(np.ascontiguousarray(data)).hexdigest()[:16]]
             for n, (kind, shape, data) in tensors.items()}  # fmt: skip
    assert found == EXPECTED[name][kind]
    # Names that the converter makes of the folder's; what it writes only to say that there is nothing of the kind.
    ours = {
        "general.name",
        "general.type",
        "general.size_label",
        "general.basename",
        "general.finetune",
        "tokenizer.ggml.bos_token_id",
        "phi3.attention.sliding_window",
        "phi3.rope.scaling.original_context_length",
        "qwen3.rope.scaling.yarn_attn_factor",
    }
    ours |= {"general.file_type"} if kind != "f16" else set()
    wanted = {key: value for key, value in EXPECTED[name]["metadata"].items() if key not in ours}
    same = {key: pytest.approx(value) if isinstance(value, float) else value for key, value in wanted.items()}
    assert {key: value for key, value in metadata.items() if key in same} == same


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != INEXACT])
@torch.no_grad()
def test_llama_cpp_computes_our_model(name):
    """Its logits of the file that `export` wrote when the golden files were made, whose metadata are those of the test
    below and whose tensors those of the test above. It also rounds activations to float16."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(7))[:1]
    ours = mini_forge.load_model(checkpoint(name)).logits(ids)[0]
    assert float((LOGITS[name] - ours).abs().max()) < 0.02 * float(ours.std())


@pytest.mark.parametrize("name", EXPECTED)
def test_metadata_are_those_with_which_llama_cpp_computed_it(name, tmp_path):
    write_run(tmp_path / "run", checkpoint(name))
    export_gguf(tmp_path / "run", tmp_path / "out.gguf")
    metadata = {k: v for k, v in read(tmp_path / "out.gguf")[0].items() if k.split(".")[0] not in ("tokenizer", "GGUF")}
    assert metadata == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in EXPECTED[name]["export"].items()}


def test_every_family_has_an_architecture():
    assert ARCHITECTURES.keys() == MODULES.keys()
    assert {json.loads((checkpoint(n) / "config.json").read_text())["model_type"] for n in EXPECTED} >= {
        "llama", "mistral", "mixtral", "granite", "smollm3", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma3_text",
        "gpt_oss", "llama4_text"}  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", EXPECTED)
@torch.no_grad()
def test_what_the_adapter_adds_is_summed_in_float32_and_rounded_once(name, kind, dtype, tmp_path):
    model = mini_forge.load_model(checkpoint(name))
    is_dense = model.spec.experts and name != INEXACT  # whose stacks stay packed; another test adapts them
    experts = ("experts.gate_up_proj", "experts.down_proj") if is_dense else ()
    targets = ("o_proj", "qkv_proj") if model.spec.fused_projections else ("q_proj", "k_proj", "o_proj", *experts)
    merged = merge(write_run(tmp_path / "run", checkpoint(name), targets, size=0.2)).state_dict()
    export_gguf(tmp_path / "run", tmp_path / "out.gguf", kind)
    tensors = read(tmp_path / "out.gguf")[1]
    block = "model.layers.1." if "blk.1.attn_q.weight" in tensors else "model.layers.0."
    wanted = {"attn_output": merged[f"{block}self_attn.o_proj.weight"]}
    if model.spec.fused_projections:
        wanted["attn_qkv"] = merged[f"{block}self_attn.qkv_proj.weight"]
    else:
        q, k = merged[f"{block}self_attn.q_proj.weight"], merged[f"{block}self_attn.k_proj.weight"]
        if ARCHITECTURES[json.loads((checkpoint(name) / "config.json").read_text())["model_type"]].swaps_rows:
            q, k = paired(q, model.spec.heads), paired(k, model.spec.kv_heads)
        wanted |= {"attn_q": q, "attn_k": k}
    if experts:
        owner = next(key for key in merged if block in key and key.endswith("experts.gate_up_proj"))
        owner = owner.removesuffix("gate_up_proj")
        F = model.spec.experts.size
        wanted["ffn_gate_exps"] = merged[owner + "gate_up_proj"][:, :F]
        wanted["ffn_up_exps"] = merged[owner + "gate_up_proj"][:, F:]
        wanted["ffn_down_exps"] = merged[owner + "down_proj"]
    for tensor, weight in wanted.items():
        found = tensors[f"blk.{block.split('.')[2]}.{tensor}.weight"]
        assert found[0] == kind and torch.equal(dense(found), weight.to(dtype).float()), tensor


def paired(weight, heads):
    """Rows 0, C/2, 1, C/2 + 1, … of each head of C rows."""
    size = len(weight) // heads
    order = [h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def test_eight_bits_are_within_half_a_step_and_narrow_rows_in_sixteen(tmp_path):
    model = write_run(tmp_path / "run", checkpoint("mistral_hub"))  # rows of 32 and of 48
    export_gguf(tmp_path / "run", tmp_path / "out.gguf", "q8_0")
    tensors = read(tmp_path / "out.gguf")[1]
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    step = weight.abs().amax(1, keepdim=True) / 127  # one block a row
    off = (dense(tensors["blk.0.ffn_up.weight"]) - weight).abs() / step
    assert tensors["blk.0.ffn_up.weight"][0] == "q8_0" and 0.4 < float(off.max()) < 0.5 + 127 * 2**-11
    assert tensors["blk.0.ffn_down.weight"][:2] == ("f16", [32, 48])


def test_experts_that_are_adapted_leave_four_bits(tmp_path):
    write_run(tmp_path / "run", checkpoint("gpt_oss_mxfp4"), ("experts.down_proj",), size=0.2)
    export_gguf(tmp_path / "run", tmp_path / "out.gguf", "bf16")
    tensors = read(tmp_path / "out.gguf")[1]
    kinds = {part: tensors[f"blk.1.ffn_{part}_exps.weight"][0] for part in ("gate", "up", "down")}
    assert kinds == {"gate": "mxfp4", "up": "mxfp4", "down": "bf16"}


def test_the_file_has_the_runs_template_and_the_ends_of_its_responses(tmp_path):
    run, template = tmp_path / "run", "{% for m in messages %}{{ '<|user|>' + m['content'] + 'the' }}{% endfor %}"
    write_run(run, checkpoint("mistral_hub"))
    (run / "chat_template.jinja").write_text(template)
    export_gguf(run, tmp_path / "out.gguf")
    metadata, _ = read(tmp_path / "out.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.chat_template"] == template and metadata["general.name"] == "mistral_hub"
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert tokens[metadata["tokenizer.ggml.eot_token_id"]] == "the"  # which ends what the template spells
    assert "tokenizer.ggml.bos_token_id" not in metadata and metadata["tokenizer.ggml.add_bos_token"] is False


def test_a_bos_of_the_template_that_there_is_not_is_told(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, checkpoint("mistral_hub"))
    (run / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert main(["export", str(run), str(tmp_path / "out.gguf")]) == 0
    assert "note: llama.cpp spells some token for the chat template's bos_token" in capsys.readouterr().out


def tokenizer_folder(folder, state, **config):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TOKENIZERS["cuts"])
def test_a_way_to_cut_text_has_the_name_under_which_llama_cpp_cuts_it_so(name, tmp_path):
    cut, state = TOKENIZERS["cuts"][name], copy.deepcopy(TOKENIZERS["tokenizer"])
    state["pre_tokenizer"], state["model"]["ignore_merges"] = cut["pre_tokenizer"], cut["ignore_merges"]
    tokenizer = tokenizer_folder(tmp_path / "t", state)
    assert [tokenizer.encode(text) for text in TOKENIZERS["texts"]] == cut["ids"]  # llama.cpp's
    values, notes = vocabulary(tokenizer, tokenizer.vocab_size, "base")
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == name
    assert ["combining marks" in note for note in notes] == [True] * (name in ("tekken", "gpt-4o"))
    assert values["tokenizer.ggml.merges"][:2] == [" ".join(merge) for merge in state["model"]["merges"][:2]]
    assert values["tokenizer.ggml.tokens"][0] == "<|end|>" and values["tokenizer.ggml.token_type"][:3] == [3, 1, 1]


@pytest.mark.parametrize("adds_space", [False, True])
@pytest.mark.parametrize("form", ["normalizer", "metaspace"])
def test_sentencepieces_kind_has_scores_by_which_llama_cpp_merges_alike(adds_space, form, tmp_path):
    golden = TOKENIZERS["pieces"]
    state = copy.deepcopy(golden["tokenizer"])
    if form == "metaspace":
        scheme = "always" if adds_space else "never"
        state["normalizer"] = None
        state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    elif adds_space:
        steps = [{"type": "Prepend", "prepend": "▁"}, state["normalizer"]]
        state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    tokenizer = tokenizer_folder(tmp_path / "t", state, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    texts, differs = TOKENIZERS["texts"], form == "metaspace" and adds_space
    same = [i for i, text in enumerate(texts) if not (differs and text.startswith(" "))]  # has one already
    assert len(same) > 3 and all(tokenizer.encode(texts[i]) == golden["ids"][str(adds_space)][i] for i in same)
    values, notes = vocabulary(tokenizer, tokenizer.vocab_size + 2, "base", ends=[2, 0])
    assert ["even where it begins with one" in note for note in notes] == [True] * differs
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.add_space_prefix"] == adds_space
    assert values["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * (tokenizer.vocab_size - 259), 5, 5]
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 1}]"
    ids = {name: values[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos", "eot")}
    assert ids == {"unknown": 0, "bos": 1, "eos": 2, "eot": 0}
    scores = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True))
    made = ["".join(merge) for merge in state["model"]["merges"]]
    assert len(made) > 20 and sorted(made, key=scores.get, reverse=True) == sorted(made, key=made.index)


@pytest.mark.parametrize("begins_with_bos", [False, True])
def test_a_space_before_a_text_alone_is_not_one_behind_its_bos(begins_with_bos, tmp_path):
    state = copy.deepcopy(PIECES)
    state["normalizer"] = None
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer = tokenizer_folder(tmp_path / "t", state, bos_token="<s>", eos_token="</s>")
    assert tokenizer.encode("<s>Hello")[1:] == tokenizer.encode("</s>Hello")[1:] != tokenizer.encode("Hello")
    values, notes = vocabulary(tokenizer, tokenizer.vocab_size, "base", begins_with_bos)
    assert values["tokenizer.ggml.add_bos_token"] == begins_with_bos
    assert values["tokenizer.ggml.add_space_prefix"] == (not begins_with_bos) and len(notes) == 1


@pytest.mark.parametrize(("template", "begins"), [
    ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", True),
    ("{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}", False),
    ("{{ raise_exception('no') }}", True),
])  # fmt: skip
def test_a_bos_is_put_before_texts_as_in_training_whatever_the_tokenizer_would_do(template, begins, tmp_path):
    run = tmp_path / "run"
    write_run(run, checkpoint("mistral_hub"))
    state = json.loads((run / "tokenizer.json").read_text())
    processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (run / "tokenizer.json").write_text(json.dumps(state | {"post_processor": json.loads(processor.__getstate__())}))
    (run / "tokenizer_config.json").write_text('{"eos_token": "the", "bos_token": "<|endoftext|>"}')
    (run / "chat_template.jinja").write_text(template)
    export_gguf(run, tmp_path / "out.gguf")
    metadata = read(tmp_path / "out.gguf")[0]
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.bos_token_id"]) == (begins, 0)


def with_added(state, content, special=False, **flags):
    """The state with one more added token, behind all others."""
    state = copy.deepcopy(state)
    token = {"id": len(state["model"]["vocab"]) + 1, "content": content, "special": special, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False, **flags}  # fmt: skip
    state["added_tokens"].append(token)
    return state


def test_added_tokens_are_spelled_as_the_text_has_them(tmp_path):
    state = with_added(PIECES, "▁▁")
    tokenizer = tokenizer_folder(tmp_path / "t", state)
    values, _ = vocabulary(tokenizer, tokenizer.vocab_size + 1, "base")
    assert (values["tokenizer.ggml.tokens"][-1], values["tokenizer.ggml.token_type"][-1]) == ("  ", 4)
    tokenizer = tokenizer_folder(tmp_path / "u", with_added(BYTES, "<|tool|>"))
    assert vocabulary(tokenizer, tokenizer.vocab_size + 1, "base")[0]["tokenizer.ggml.token_type"][-1] == 3


@pytest.mark.parametrize(("change", "note"), [
    (lambda state: state["model"].update(ignore_merges=True), "merges also words that are tokens"),
    (lambda state: state.update(normalizer={"type": "NFC"}), "not in Unicode's form NFC"),
    (lambda state: state["added_tokens"][0].update(lstrip=True), "leaves the spaces around special tokens"),
    (lambda state: state["added_tokens"].append({**state["added_tokens"][0], "id": 999, "content": "<img>"}),
     "<img> is left out: the model's embedding has no row 999"),
])  # fmt: skip
def test_what_llama_cpp_takes_otherwise_in_rare_texts_is_told(change, note, tmp_path):
    state = copy.deepcopy(BYTES)
    change(state)
    tokenizer = tokenizer_folder(tmp_path / "t", state)
    notes = vocabulary(tokenizer, 700, "base")[1]
    assert len(notes) == 1 and note in notes[0]


def test_pieces_that_can_be_made_in_ways_that_no_merge_names_are_told(tmp_path):
    state = copy.deepcopy(PIECES)
    del state["model"]["merges"][5]
    tokenizer = tokenizer_folder(tmp_path / "t", state)
    notes = vocabulary(tokenizer, tokenizer.vocab_size, "base")[1]
    assert len(notes) == 1 and "pieces in more ways" in notes[0]


@pytest.mark.parametrize(("name", "swallows", "is_phi", "named", "told"), [
    ("base", True, True, "Phi-3 base", False),
    ("Phi-3-mini", True, True, "Phi-3-mini", False),
    ("phi3-mine", False, False, "phi 3-mine", False),
    ("base", True, False, "base", True),
    ("base", False, True, "base", False),
])  # fmt: skip
def test_a_name_tells_llama_cpp_whether_special_tokens_swallow_spaces(name, swallows, is_phi, named, told, tmp_path):
    state = with_added(PIECES, "<|endoftext|>" if is_phi else "<|other|>", special=True)
    for token in state["added_tokens"]:
        token["rstrip"] = swallows and token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    tokenizer = tokenizer_folder(tmp_path / "t", state)
    values, notes = vocabulary(tokenizer, tokenizer.vocab_size + 1, name)
    assert values["general.name"] == named
    assert [note for note in notes if "leaves the spaces behind" in note] == notes and len(notes) == told


@pytest.mark.parametrize(("change", "message"), [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
    ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}},
     "'x+'"),
    ({"pre_tokenizer": None}, "pre_tokenizer ''"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    ({"model": BYTES["model"] | {"merges": []}}, "without merges"),
    ({"model": BYTES["model"] | {"end_of_word_suffix": "</w>"}}, "affixes ['</w>']"),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "model 'WordLevel'"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_said_in_llama_cpps_words_is_refused(change, message, tmp_path):
    tokenizer = tokenizer_folder(tmp_path / "t", copy.deepcopy(BYTES) | change)
    with pytest.raises(CheckpointError) as caught:
        vocabulary(tokenizer, 700, "base")
    assert "tokenizer.json: " in str(caught.value) and message in str(caught.value)


def test_a_tokenizer_may_leave_out_what_it_has_not(tmp_path):
    state = {k: v for k, v in BYTES.items() if k not in ("normalizer", "added_tokens")}
    assert vocabulary(tokenizer_folder(tmp_path / "t", state), 700, "base")[0]["tokenizer.ggml.pre"] == "gpt-2"


def test_more_tokens_than_rows_are_refused(tmp_path):
    tokenizer = tokenizer_folder(tmp_path / "t", BYTES)
    with pytest.raises(CheckpointError, match="embedding 64 rows"):
        vocabulary(tokenizer, 64, "base")


@pytest.mark.parametrize(("name", "words"), [
    ("llama4_text_dense", ["a bias on attention's output", "chunks of 8192", "temperature"]),
    ("qwen3_moe_step", ["some layers only", "not divided"]),
    ("gemma3_text_untied", ["query_pre_attn_scalar 8 in place of 16"]),
    ("smollm3_sliding", ["biases in the MLP", "every 4th"]),
    ("gpt_oss_hub", ["clamped by (1.0, 1.702) in place of (7.0, 1.702)"]),
])  # fmt: skip
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(name, words, tmp_path, capsys):
    targets = ("o_proj",)
    write_run(tmp_path / "run", checkpoint(name), targets)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out.gguf")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") and "config.json: " in line and "`merge`" in line for line in lines)
    assert all(any(word in line for line in lines) for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("name", "change", "words"), [
    ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5}}, "YaRN's alone"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "without sliding layers"),
])  # fmt: skip
def test_so_is_one_whose_config_differs_in_a_key(name, change, words, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint(name), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    write_run(tmp_path / "run", base)
    with pytest.raises(CheckpointError, match=words):
        export_gguf(tmp_path / "run", tmp_path / "out.gguf")


def test_rotations_of_a_part_are_a_problem_where_they_are_not_taken():
    spec = mini_forge.load_model(checkpoint("phi3_partial_hub")).spec
    assert not problems(ARCHITECTURES["phi3"], spec)
    assert "rotations of a part of each head" in problems(ARCHITECTURES["qwen2"], spec)


def test_a_family_that_llama_cpp_is_not_asked_for_is_refused(tmp_path, monkeypatch):
    write_run(tmp_path / "run", checkpoint("qwen2_hub"))
    monkeypatch.delitem(ARCHITECTURES, "qwen2")
    with pytest.raises(CheckpointError, match="model_type 'qwen2' is none that export knows; use `merge`"):
        export_gguf(tmp_path / "run", tmp_path / "out.gguf")


# What the architectures, their tables and the tests above know of. An option of the decoder that is new here must be
# looked for in `problems`, or written into the file, before a model that has it is exported as one that has not.
KNOWN = {
    DecoderSpec: "vocab_size hidden_size mlp_size heads kv_heads head_size layers rope norm_eps max_positions qkv_bias "
    "out_bias mlp_bias tied_head qk_norm norm_product norm_offset post_norms local_rope rope_interleaved sinks "
    "attention_scale temperature activation clamp experts mlp_name fused_projections embed_scale residual_scale "
    "hidden_scale",
    LayerSpec: "window chunk rope temperature experts",
    ExpertsSpec: "count top_k size router normalized router_name router_bias bias shared_size balance_coef",
}


@pytest.mark.parametrize("spec", KNOWN)
def test_every_option_of_the_decoder_is_known_to_export(spec):
    assert [field.name for field in fields(spec)] == KNOWN[spec].split()


def test_the_command_says_where_a_window_is_missing(tmp_path, capsys):
    write_run(tmp_path / "run", checkpoint("mistral_sliding"))
    out = tmp_path / "new" / "out.gguf"
    assert main(["export", str(tmp_path / "run"), str(out), "--type", "q8_0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "note: llama.cpp has no sliding window for llama: texts of more than 8 tokens differ",
        f"merged model saved in {out}",
    ]
    assert read(out)[0]["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]


def test_what_cannot_be_written_is_one_line_and_harms_nothing(tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out.gguf"
    write_run(run, checkpoint("mistral_hub"))
    out.write_text("mine")
    (tmp_path / "file").write_text("")

    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "exists; name a new file" in refused(run, out) and out.read_text() == "mine"
    assert "no adapter_config.json" in refused(tmp_path, tmp_path / "new.gguf")
    assert "cannot be written" in refused(run, tmp_path / "file" / "new.gguf")
    assert "invalid choice" in refused(run, tmp_path / "new.gguf", "--type", "q4_0")
    assert "cannot be" in refused(run, tmp_path / ("n" * 300))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'mini-forge[gguf]'" in refused(run, tmp_path / "new.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out.gguf", "run"]


def test_weights_too_large_for_f16_are_refused_and_fit_bf16(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint("mistral_hub"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    write_run(tmp_path / "run", base)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight: .* use --type bf16"):
        export_gguf(tmp_path / "run", tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    export_gguf(tmp_path / "run", tmp_path / "out.gguf", "bf16")
    assert float(dense(read(tmp_path / "out.gguf")[1]["blk.1.ffn_up.weight"]).max()) == 70144


@pytest.mark.parametrize("kind", TYPES)
def test_a_base_with_nan_is_refused(kind, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint("mistral_hub"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    write_run(tmp_path / "run", base)
    with pytest.raises(CheckpointError, match="input_layernorm.weight: holds numbers that are not finite"):
        export_gguf(tmp_path / "run", tmp_path / "out.gguf", kind)


def test_another_type_is_refused_from_python_too(tmp_path):
    with pytest.raises(ConfigError, match="kind: 'q4_0' must be one of f16, bf16, q8_0"):
        export_gguf(tmp_path, tmp_path / "out.gguf", "q4_0")
