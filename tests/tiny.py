"""Tiny checkpoints and datasets for tests, made on the spot."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_files(folder: Path, chat_template: str | None = CHAT_TEMPLATE):
    """A tokenizer whose tokens are the 256 bytes, after four special tokens."""
    specials = ["<|im_start|>", "<|im_end|>", "<unk>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    record = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if chat_template is not None:
        record["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(record))


def random_model(seed: int = 0, **changes) -> Decoder:
    """A float32 decoder of CONFIG with `changes`, its weights from a normal distribution of deviation 0.1."""
    model = Decoder(decoder_spec({**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        center = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data = center + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """A model folder in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    tensors = {k: v.contiguous() for k, v in random_model(seed, **changes).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_files(folder)
    return folder


def write_rows(path: Path, count: int = 12) -> Path:
    """Rows of unequal lengths: sums to work out."""
    rows = [
        {"input": f"{i} + {i * i}" + " please" * (i % 4), "output": f"= {i + i * i}" * (1 + i % 3)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_unreadable(path: Path):
    """A regular file in place of `path` that opens, but cannot be read by anybody: Linux answers EIO, to root too."""
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")
