"""A tokenizer.json in llama.cpp's words: tokens with their kinds, merges or scores, and how text is cut into words.

Two kinds of BPE are told apart, by what they fall back on. Byte-level ones ("gpt2" there) merge by rank, and llama.cpp
knows their ways of cutting text by names of its own: the regular expressions of a tokenizer.json say which it is, and
one that is not known here is refused, because with another the model would see other tokens than in training.
Sentencepiece's ("llama" there) have ▁ for spaces and bytes in place of what they do not know. Those are merged by
score; the negated rank of the merge that makes a piece orders pieces as the scores they were made from do.

What llama.cpp takes otherwise in rare texts only is told in notes.
"""

import json
import re
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError
from mini_forge.json_faults import read_json


class Kind(IntEnum):
    """llama.cpp's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens that checkpoints forget to call special, and llama.cpp's converter does not.
CONTROLS = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
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
# The steps in which text is cut: llama.cpp's names for it, by whether a word that is a token is taken whole there.
PRE_TOKENIZERS = {
    (BYTES,): {False: "gpt-2"},
    (DIGITS, BYTES): {False: "smollm"},
    (LLAMA3,): {True: "llama-bpe", False: "smaug-bpe"},
    (QWEN2,): {False: "qwen2"},
    (TEKKEN,): {True: "tekken"},
    (GPT4O,): {False: "gpt-4o"},
}
# Where sentencepiece's kind is given a space, by Metaspace's prepend_scheme and whether llama.cpp is told to.
SPACES = {
    ("always", True): "a space before a text even where it begins with one, unlike this tokenizer",
    ("first", True): "a space behind each special token, this tokenizer before a text alone",
    ("first", False): "no space before a text that begins with no special token, unlike this tokenizer",
}
# Words in a model's name by which llama.cpp has special tokens swallow the spaces behind them, but for the first three
# of these, all four of which must be tokens.
SWALLOWING, MUST_BE_TOKENS = re.compile("phi-?3", re.IGNORECASE), ("<unk>", "<s>", "<|endoftext|>", "</s>")


def vocabulary(
    tokenizer: Tokenizer, rows: int, name: str, begins_with_bos: bool = False, ends: Sequence[int] = ()
) -> tuple[dict, list[str]]:
    """The tokenizer by its GGUF keys, with the model's name, and notes on where llama.cpp cuts text otherwise, a line
    each.

    rows: of the embedding, which may be more than tokens. begins_with_bos: whether the template begins a text with a
    BOS, which llama.cpp then puts before any, as in training. ends: the tokens that end a response, the tokenizer's own
    first; the file has room for three, others llama.cpp knows by their names. Raises CheckpointError for a tokenizer
    that cannot be said in llama.cpp's words."""
    where = tokenizer.path / "tokenizer.json"
    state, notes = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None} | read_json(where), []
    model = state["model"]
    affixes = [model[key] for key in ("end_of_word_suffix", "continuing_subword_prefix") if model.get(key)]
    if affixes:
        raise _unknown(where, f"affixes {affixes}")
    if model.get("type", "BPE") != "BPE" or not model.get("merges"):
        raise _unknown(where, f"a model {model.get('type')!r} without merges")
    tokens, kinds = _tokens(state, rows, where, notes)
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    values = {
        "general.name": _model_name(name, state["added_tokens"], tokenizer, notes),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
    }
    if model.get("byte_fallback"):
        values |= _sentencepiece(state, tokens, kinds, merges, where, begins_with_bos, notes)
    else:
        values |= _byte_level(state, merges, where, notes)
    if any(token.get("lstrip") or token.get("single_word") for token in state["added_tokens"]):
        notes.append("llama.cpp leaves the spaces around special tokens, some of which swallow them here")
    ids = {"bos": tokenizer.bos_id, "unknown": tokenizer.token_id(tokenizer.unk_token), "padding": tokenizer.pad_id}
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    values |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    return values | {"tokenizer.ggml.add_bos_token": begins_with_bos, "tokenizer.ggml.add_eos_token": False}, notes


def _model_name(name: str, added: list[dict], tokenizer: Tokenizer, notes: list[str]) -> str:
    """The name, so that llama.cpp takes the spaces behind special tokens as this tokenizer does; a note where it
    cannot."""
    swallows = any(token.get("rstrip") for token in added)
    usual = all(bool(token.get("rstrip")) == (token["content"] not in MUST_BE_TOKENS[:3]) for token in added)
    if swallows and usual and all(tokenizer.token_id(token) is not None for token in MUST_BE_TOKENS):
        return name if SWALLOWING.search(name) else f"Phi-3 {name}"
    if swallows:
        notes.append("llama.cpp leaves the spaces behind special tokens, some of which swallow them here")
    return SWALLOWING.sub("phi 3", name)


def _tokens(state: dict, rows: int, where: Path, notes: list[str]) -> tuple[list[str], list[Kind]]:
    """All tokens in order of their ids, and their kinds; rows of the embedding without a token have a name too."""
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [Kind.UNUSED] * rows
    model = state["model"]
    has_bytes = bool(model.get("byte_fallback"))
    if max(model["vocab"].values()) >= rows:
        raise CheckpointError(
            f"{where}: has tokens up to id {max(model['vocab'].values())}, the model's embedding {rows} rows; take "
            "tokenizer and weights from one source"
        )
    for text, i in model["vocab"].items():
        tokens[i], kinds[i] = text, Kind.BYTE if has_bytes and BYTE.fullmatch(text) else Kind.NORMAL
    for token in state["added_tokens"]:
        i, text = token["id"], token["content"]
        if i >= rows:  # Gemma's picture token, of models with pictures
            notes.append(f"the token {text} is left out: the model's embedding has no row {i}")
        elif text == model.get("unk_token"):
            kinds[i] = Kind.UNKNOWN
        elif token["special"] or CONTROLS.fullmatch(text):
            tokens[i], kinds[i] = text, Kind.CONTROL
        else:  # which llama.cpp finds in the text, and prints, as they are
            tokens[i] = text.replace(SPACE, " ") if has_bytes else text
            kinds[i] = Kind.USER_DEFINED
    return tokens, kinds


def _byte_level(state: dict, merges: list, where: Path, notes: list[str]) -> dict:
    normalizers = {step["type"] for step in _steps(state["normalizer"], "normalizers")}
    if normalizers - {"NFC"}:
        raise _unknown(where, f"normalizer {', '.join(sorted(normalizers))}")
    if normalizers:
        notes.append(
            "llama.cpp takes text as it comes: what is not in Unicode's form NFC, which is rare, is cut otherwise"
        )
    steps, takes_whole = _pre_tokenizer(state, where), state["model"].get("ignore_merges", False)
    names = PRE_TOKENIZERS.get(steps)
    if names is None:
        raise _unknown(where, f"pre_tokenizer {' then '.join(steps)!r}")
    if takes_whole not in names:
        notes.append(
            f"llama.cpp {'merges also' if takes_whole else 'does not merge'} words that are tokens as a whole, unlike "
            "this tokenizer: some are cut otherwise"
        )
    if steps in ((TEKKEN,), (GPT4O,)):
        notes.append("llama.cpp cuts words with combining marks, as of Hindi, Khmer and Thai, otherwise")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names.get(takes_whole) or next(iter(names.values())),
        "tokenizer.ggml.merges": [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges],
    }


def _pre_tokenizer(state: dict, where: Path) -> tuple[str, ...]:
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


def _sentencepiece(
    state: dict, tokens: list[str], kinds: list[Kind], merges: list, where: Path, begins_with_bos: bool,
    notes: list[str],
) -> dict:  # fmt: skip
    adds_space, replaces = False, False
    for step in [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")]:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            adds_space = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            scheme, replaces = step.get("prepend_scheme", "always"), True
            # "first" is before a text, and so not behind a BOS that it begins with; llama.cpp's is behind each special
            # token, or nowhere.
            adds_space = scheme == "always" or (scheme == "first" and not begins_with_bos)
            if scheme != "never":
                notes.append(f"llama.cpp puts {SPACES[scheme, adds_space]}: a few texts are cut otherwise")
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:  # Gemma's: there are no spaces left by then
            raise _unknown(where, json.dumps(step, ensure_ascii=False))
    if not replaces:
        raise _unknown(where, f"spaces that are not {SPACE}")
    rank = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.NORMAL}
    listed = {(left, right) for left, right in merges}
    ways = ((token, (token[:i], token[i:])) for token in normal for i in range(1, len(token)))
    unlisted = {token for token, way in ways if way not in listed and normal.issuperset(way)}
    if unlisted:
        notes.append(
            f"llama.cpp makes {len(unlisted)} of {len(normal)} pieces in more ways than this tokenizer's merges name: "
            "some text may be cut otherwise"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(rank.get(token, len(merges))) if token in normal else 0.0 for token in tokens],
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


def _steps(step: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer that may be a sequence of some."""
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _unknown(where: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}: export knows no words of llama.cpp for it; use `merge`")
