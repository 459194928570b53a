"""A tokenizer.json in llama.cpp's words: tokens with their kinds, merges or scores, and how text is cut into words.

Two kinds of BPE are told apart, by what they fall back on. Byte-level ones ("gpt2" there) merge by rank, and llama.cpp
knows their ways of cutting text by names of its own: the regular expressions of a tokenizer.json say which it is, and
one that it does not have is refused, because with another the model would see other tokens than in training.
Sentencepiece's ("llama" there) have ▁ for spaces and bytes in place of what they do not know. Those are merged by
score; the negated rank of the merge that makes a piece orders pieces as the scores they were made from do.
"""

import json
from enum import IntEnum

from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError


class Kind(IntEnum):
    """llama.cpp's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPACE = "▁"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}" + _REST
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = "|".join(_CASED) + r"|\p{N}" + _REST_WITH_SLASH
GPT4O = "|".join(part + CONTRACTIONS + "?" for part in _CASED) + r"|\p{N}{1,3}" + _REST_WITH_SLASH
BYTES, DIGITS = "bytes", "digits"  # GPT-2's expression, which is ByteLevel's own; single digits
# Steps of a pre-tokenizer, and whether a word that is a token is taken whole: None where llama.cpp has only one of both
PRE_TOKENIZERS = {
    ((BYTES,), None): "gpt-2",
    ((DIGITS, BYTES), None): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), None): "qwen2",
    ((TEKKEN,), None): "tekken",
    ((GPT4O,), None): "gpt-4o",
}


def vocabulary(tokenizer: Tokenizer, rows: int, stop_ids: list[int]) -> dict[str, int | str | bool | list]:
    """The tokenizer by its GGUF keys. rows: of the embedding, which may be more than tokens. stop_ids: the tokens
    that end a response, the template's own first; the file has room for two, and llama.cpp knows others by their names.
    Raises CheckpointError for a tokenizer that llama.cpp does not have."""
    state = json.loads((tokenizer.path / "tokenizer.json").read_bytes())
    model, where = state["model"], tokenizer.path / "tokenizer.json"
    if model.get("type", "BPE") != "BPE":
        raise _unknown(where, f"model {model['type']!r}")
    tokens, kinds = _tokens(state, rows, where)
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    values = {"tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        values |= _sentencepiece(state, tokens, kinds, merges, where)
    else:
        values |= _byte_level(state, merges, where)
    values |= {
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    ends = (*stop_ids, None, None)
    ids = {"bos": tokenizer.bos_id, "eos": ends[0], "eot": ends[1], "unknown": tokenizer.token_id(tokenizer.unk_token),
           "padding": tokenizer.pad_id}  # fmt: skip
    return values | {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}


def _tokens(state: dict, rows: int, where) -> tuple[list[str], list[Kind]]:
    """All tokens in order of their ids, and their kinds; rows of the embedding without a token have a name too."""
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [Kind.UNUSED] * rows
    model = state["model"]
    added = {token["id"]: token for token in state["added_tokens"]}
    named = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if named and max(named) >= rows:
        raise CheckpointError(
            f"{where}: token {named[max(named)]!r} has the id {max(named)}, the model's embedding {rows} rows; take "
            "tokenizer and weights from one source"
        )
    for i, text in named.items():
        tokens[i] = text
        if text == model.get("unk_token"):
            kinds[i] = Kind.UNKNOWN
        elif i in added:
            is_control = added[i]["special"] or (text.startswith("<|") and text.endswith("|>"))  # as its converter does
            kinds[i] = Kind.CONTROL if is_control else Kind.USER_DEFINED
        elif model.get("byte_fallback") and _is_byte(text):
            kinds[i] = Kind.BYTE
        else:
            kinds[i] = Kind.NORMAL
    return tokens, kinds


def _is_byte(token: str) -> bool:
    """Whether a token is one byte, as <0x0A>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level(state: dict, merges: list, where) -> dict:
    kinds = {step["type"] for step in _steps(state["normalizer"], "normalizers")}
    if kinds - {"NFC"}:  # Qwen's; llama.cpp takes text as it comes, and text mostly comes so
        raise _unknown(where, f"normalizer {', '.join(sorted(kinds))}")
    steps, ignores_merges = _pre_tokenizer(state, where), state["model"].get("ignore_merges", False)
    name = PRE_TOKENIZERS.get((steps, None)) or PRE_TOKENIZERS.get((steps, ignores_merges))
    if name is None:
        raise _unknown(where, f"pre_tokenizer {' then '.join(steps)!r}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges],
    }


def _pre_tokenizer(state: dict, where) -> tuple[str, ...]:
    """The steps in which text is cut, in the words of PRE_TOKENIZERS."""
    found = []
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        pattern = step.get("pattern", {}).get("Regex")
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            found += [BYTES] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif step["type"] == "Split" and pattern and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(pattern)
        elif step["type"] == "Split" and pattern and step["behavior"] == "Removed" and step["invert"]:
            found.append(pattern)  # what the expression does not match is removed: it matches everything
        else:
            raise _unknown(where, f"pre_tokenizer {json.dumps(step, ensure_ascii=False)}")
    return tuple(found)


def _sentencepiece(state: dict, tokens: list[str], kinds: list[Kind], merges: list, where) -> dict:
    adds_space, replaces = False, False  # llama.cpp's space comes even before a text that begins with one
    for step in [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")]:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            adds_space = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            adds_space, replaces = step.get("prepend_scheme", "always") != "never", True
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:  # Gemma's: there are no spaces left by then
            raise _unknown(where, json.dumps(step, ensure_ascii=False))
    if not replaces:
        raise _unknown(where, f"spaces that are not {SPACE}")
    rank = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    scores = [
        -float(rank.get(token, len(merges))) if kind == Kind.NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


def _steps(step: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer that may be a sequence of some."""
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _unknown(where, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what} is nothing that llama.cpp has; use `mini-forge merge` and another program")
