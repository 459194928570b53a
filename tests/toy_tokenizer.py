"""Tiny tokenizers made on the spot: byte-level like Qwen's and Llama 3's, and piece-level like Llama 2's."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mini_forge.data.tokenizer import load_tokenizer

CORPUS = ["What is two and two? The answer is four.", "USER: hello\nASSISTANT: hello there, good day", "a b c d e"] * 4


@cache
def _byte_level(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


@cache
def _pieces() -> str:
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # in training alone: ▁ only begins a piece
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return json.dumps(state)


def byte_level(folder, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **config):
    """A byte-level tokenizer whose end of text, and padding, is the last special token."""
    config = {"eos_token": special[-1], "pad_token": special[-1], **config}
    return _write(folder, _byte_level(tuple(special)), config)


def pieces(folder, **config):
    """A sentencepiece-like tokenizer with ▁ for spaces, byte fallback and a BOS of its own."""
    return _write(folder, _pieces(), {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **config})


def _write(folder, tokenizer_json, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)
