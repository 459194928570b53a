"""Extractive answers by construction: generation that can only spell a span of a context.

All spelling is in UTF-8 bytes, because tokens may hold a part of a character. A generation is a walk over byte offsets
of the context: a token may follow where the context goes on with its bytes. Before the walk stands START, where one
space may be spelled first (" Paris" for "Paris"); CLOSED follows white space written before the end token.
"""

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError, DataError

START, SPACED, CLOSED = -1, -2, -3
_CLOSERS = (b" ", b"\n", b"\n\n")  # templates may put them between an answer and its end token


class TokenBytes:
    """What each token of a vocabulary spells. Special tokens spell nothing. Make it once per tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises CheckpointError for vocabularies that are neither byte-level nor SentencePiece-like."""
        self.spelling = _spellings(tokenizer)  # id → bytes, never empty
        self.ids: dict[bytes, list[int]] = defaultdict(list)
        lengths: dict[int, set[int]] = defaultdict(set)
        for token, spelling in self.spelling.items():
            self.ids[spelling].append(token)
            lengths[spelling[0]].add(len(spelling))
        self._lengths = {first: sorted(found) for first, found in lengths.items()}

    def spelled_at(self, text: bytes, start: int) -> Iterator[tuple[int, int]]:
        """(id, length) of every token that spells what `text` has at `start`."""
        for length in self._lengths.get(text[start], ()):
            if start + length > len(text):
                break
            for token in self.ids.get(text[start : start + length], ()):
                yield token, length


class ContextSpans:
    """Which tokens may follow, so that at most `max_new_tokens` of them spell a span of `context`, and then stop.

    With `whole_words` a span begins and ends at edges of words; in scripts without spaces, at any character. A token
    is allowed only if the rest can still be spelled to such an end within the limit, so a generation that uses up
    its tokens ends properly too. Raises DataError if no span can be spelled."""

    def __init__(
        self, context: str, tokens: TokenBytes, stop_ids: Sequence[int], max_new_tokens: int, whole_words: bool = True
    ):
        self._tokens, self._limit = tokens, max_new_tokens
        self._stops = frozenset(stop_ids)
        starts, self._ends = span_edges(context, whole_words)
        self._moves, self._needed = self._walk(context.encode(), starts)
        if self._needed[START] > max_new_tokens:
            raise DataError(
                f"context: no span of it can be spelled in {max_new_tokens} tokens; raise the number of new tokens, "
                "or generate freely (--free)"
            )

    def allowed(self, new_tokens: Sequence[int]) -> list[int]:
        """The ids that may follow `new_tokens`, ascending; never empty after tokens that were allowed themselves."""
        left = self._limit - len(new_tokens)
        reached = self._reach(new_tokens)
        ids = {
            token
            for origin in reached
            for token, places in self._moves[origin].items()
            if any(self._needed[place] < left for place in places)
        }
        if any(place == CLOSED or place in self._ends for place in reached):
            ids |= self._stops
        return sorted(ids)

    def text(self, new_tokens: Sequence[int]) -> str:
        """The span that the tokens spell: a substring of the context."""
        return b"".join(self._tokens.spelling[token] for token in new_tokens).decode().strip()

    def _reach(self, new_tokens: Sequence[int]) -> set[int]:
        """Every offset at which the text so far can end: a word may occur more than once."""
        reached = {START}
        for token in new_tokens:
            reached = {place for origin in reached for place in self._moves[origin].get(token, ())}
        return reached

    def _walk(self, text: bytes, starts: set[int]) -> tuple[dict[int, dict[int, set[int]]], dict[int, float]]:
        """Moves: from a place by a token to places. Needed: the fewest tokens from a place to a span's end."""
        moves: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        needed: dict[int, float] = {CLOSED: 0, len(text): 0 if len(text) in self._ends else math.inf}
        closers = [token for closer in _CLOSERS for token in self._tokens.ids.get(closer, ())]
        for origin in range(len(text), -1, -1):
            if origin < len(text):
                for token, length in self._spelled(text, origin):
                    moves[origin][token].add(origin + length)
                needed[origin] = 0 if origin in self._ends else self._fewest(moves[origin], needed)
            if origin in self._ends:
                for token in closers:
                    moves[origin][token].add(CLOSED)
        for start in starts:
            for token, places in moves[start].items():
                moves[SPACED][token] |= {place for place in places if place > start}
        for token, places in moves[SPACED].items():
            moves[START][token] |= places
        needed[SPACED] = self._fewest(moves[SPACED], needed)
        longest = max(map(len, self._tokens.ids))
        for start in starts:
            for token, length in self._spelled(b" " + text[start : start + longest], 0):
                moves[START][token].add(start + length - 1 if length > 1 else SPACED)
        needed[START] = self._fewest(moves[START], needed)
        return moves, needed

    def _spelled(self, text: bytes, start: int) -> Iterator[tuple[int, int]]:
        """A stop id that spells text (where an end is no single token) keeps its meaning as a stop."""
        return (found for found in self._tokens.spelled_at(text, start) if found[0] not in self._stops)

    @staticmethod
    def _fewest(moves: dict[int, set[int]], needed: dict[int, float]) -> float:
        return 1 + min((needed[place] for places in moves.values() for place in places), default=math.inf)


def span_edges(context: str, whole_words: bool = True) -> tuple[set[int], set[int]]:
    """The byte offsets at which spans may start and end: next to what is not white space, and not within a word."""
    starts, ends, offset, before = set(), set(), 0, " "
    for char in context:
        if not (whole_words and _is_one_word(before, char)):
            if not char.isspace():
                starts.add(offset)
            if not before.isspace():
                ends.add(offset)
        before, offset = char, offset + len(char.encode())
    if not before.isspace():
        ends.add(offset)
    return starts, ends


def _is_one_word(left: str, right: str) -> bool:
    """Letters, digits and accents stick together; letters without case (Lo: Chinese, Thai, Arabic) do not, because
    many of their scripts write no spaces. An accent sticks to whatever it follows."""
    kinds = unicodedata.category(left), unicodedata.category(right)
    return kinds[1][0] == "M" or all(kind[0] in "LMN" and kind != "Lo" for kind in kinds)


def _spellings(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Bytes by id, read from the vocabulary itself: decoding single tokens loses spaces and parts of characters."""
    backend = tokenizer._backend
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
    if "ByteLevel" in steps:
        spell = _byte_level
    elif "Metaspace" in steps or "ByteFallback" in steps:
        spell = _sentencepiece
    else:
        raise CheckpointError(
            f"{tokenizer.path}: answers can be held to the context only with a byte-level or SentencePiece-like "
            "tokenizer; generate freely (--free)"
        )
    spelled = {token: spell(piece) for piece, token in backend.get_vocab(with_added_tokens=True).items()}
    for token, added in backend.get_added_tokens_decoder().items():
        spelled[token] = b"" if added.special else added.content.encode()
    return {token: spelling for token, spelling in spelled.items() if spelling}


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_level(piece: str) -> bytes:
    return bytes(_BYTE_OF[char] for char in piece) if all(char in _BYTE_OF for char in piece) else b""


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: a visible character for each byte; printable Latin-1 is itself, the rest follow from 256."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_characters()
