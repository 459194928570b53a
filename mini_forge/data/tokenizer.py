"""A checkpoint's tokenizer: text to token ids with character offsets, and back.

Only the fast format (`tokenizer.json`) is read. Special tokens are never added by the tokenizer: a template spells
every one of them, so none can appear twice. Offsets count characters of the text given, whatever the tokenizer
normalises; a token that holds a part of a character has the offsets of that whole character.
"""

import shutil
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers

from mini_forge.errors import CheckpointError, DataError
from mini_forge.json_faults import read_json, read_text

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Tokenizer:
    """Made by `load_tokenizer`. Tokens and ids are None where the checkpoint names none."""

    path: Path
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    special_tokens: tuple[str, ...]  # every special token of the vocabulary, as text
    eos_ids: tuple[int, ...]  # eos_token and what generation_config.json and config.json add to it
    adds_bos: bool  # whether the tokenizer's own post-processor would begin a text with BOS
    chat_template: str | None
    _backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    @property
    def bos_id(self) -> int | None:
        return self.token_id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        return self.token_id(self.pad_token)

    @property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows; an embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str | None) -> int | None:
        """The id of one token spelled exactly so, or None."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no special tokens added (those spelled in the text are recognised). Raises DataError for a
        text with half a character, as what is not UTF-8 on a command line becomes."""
        _check_text(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids (L,) int32 and the (start, end) of their characters (L, 2) int32, on all cores."""
        for text in texts:
            _check_text(text)
        return [
            (
                np.array(encoding.ids, dtype=np.int32),
                np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding)).reshape(-1, 2),
            )
            for encoding in self._backend.encode_batch(texts, add_special_tokens=False)
        ]

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of the ids, with or without the special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder) -> None:
        """Copies the files it was read from, and writes the chat template as `chat_template.jinja`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = self.path / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", newline="")


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of a model or run folder. Raises CheckpointError when the folder has none that can be read."""
    path = Path(path)
    file = path / "tokenizer.json"
    text = read_text(file)
    if text is None:
        raise CheckpointError(
            f"{path}: no tokenizer.json here, and only fast tokenizers are read; save one with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises bare Exception, with its reason as the text
        raise CheckpointError(f"{file}: not a tokenizer this version of tokenizers reads ({error})") from error
    config = read_json(path / "tokenizer_config.json", absent={})
    tokens = _special_tokens(path, config, read_json(path / "special_tokens_map.json", absent={}))
    eos_ids = _eos_ids(path, backend, tokens["eos_token"])
    if tokens["eos_token"] is None and eos_ids:
        tokens["eos_token"] = backend.id_to_token(eos_ids[0])
    added = backend.get_added_tokens_decoder().values()
    backend.no_truncation()
    backend.no_padding()
    adds_bos = _adds_bos(backend, tokens["bos_token"])
    backend.post_processor = None  # it only adds tokens and, for GPT-2's kind, trims spaces from offsets
    return Tokenizer(
        path=path,
        **tokens,
        special_tokens=tuple(token.content for token in added if token.special and token.content.strip()),
        eos_ids=eos_ids,
        adds_bos=adds_bos,
        chat_template=_chat_template(path, config),
        _backend=backend,
    )


def _check_text(text: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 20) : error.start + 20]
        raise DataError(f"text: {shown!r}: has half a character, which no UTF-8 text has; give it as UTF-8") from None


def _special_tokens(path: Path, config: dict, special_map: dict) -> dict[str, str | None]:
    """bos, eos, pad and unk as text; a token is stored as a string or as {"content": …}."""
    tokens = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key) or special_map.get(key)
        tokens[key] = token = value.get("content") if isinstance(value, dict) else value
        if token is not None and not isinstance(token, str):
            raise CheckpointError(f"{path}: {key} {value!r} in tokenizer_config.json must be a text; write it as one")
    return tokens


def _eos_ids(path: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """Every id that ends a generation: chat models often list more than the tokenizer's own."""
    found = [] if eos_token is None else [backend.token_to_id(eos_token)]
    for name in ("generation_config.json", "config.json"):
        ids = read_json(path / name, absent={}).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if any(i is not None and (type(i) is not int or i < 0) for i in ids):
            raise CheckpointError(f"{path / name}: eos_token_id {ids!r} must be token ids; write them as whole numbers")
        found += ids
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _adds_bos(backend: tokenizers.Tokenizer, bos_token: str | None) -> bool:
    """Whether encoding with special tokens begins with a BOS that encoding without them does not."""
    bos = None if bos_token is None else backend.token_to_id(bos_token)
    first = [backend.encode("a", add_special_tokens=special).ids[:1] for special in (True, False)]
    return bos is not None and first[0] == [bos] and first[1] != [bos]


def _chat_template(path: Path, config: dict) -> str | None:
    """The Jinja text: chat_template.jinja, else the configuration's (one string, or named ones: the default)."""
    text = read_text(path / "chat_template.jinja")
    if text is not None:
        return text
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            named = {entry["name"]: entry["template"] for entry in template}
        except (KeyError, TypeError):
            named = {}
        if "default" not in named:
            raise CheckpointError(
                f'{path / "tokenizer_config.json"}: chat_template names {", ".join(map(str, named))} but no "default"; '
                "put the one to use into chat_template.jinja"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: chat_template {template!r} must be a text; "
            "put the one to use into chat_template.jinja"
        )
    return template
