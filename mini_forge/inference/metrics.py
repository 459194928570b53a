"""How alike two texts are: ROUGE for summaries, exact match and F1 for answers. All scores are fractions of 1."""

import math
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Score(NamedTuple):
    precision: float  # the share of the prediction that is right
    recall: float  # the share of the reference that is found
    f1: float  # their harmonic mean

    @classmethod
    def of(cls, common: int, predicted: int, expected: int) -> "Score":
        """From counts: found in both, in the prediction, in the reference. 0 where nothing is in common."""
        if not common:
            return cls(0.0, 0.0, 0.0)
        return cls(common / predicted, common / expected, 2 * common / (predicted + expected))


def rouge(prediction: str, reference: str) -> dict[str, Score]:
    """ROUGE-1, -2 and -L (Lin 2004, sections 2 and 3.1), as the `rouge_score` package counts them, without stemming.

    Words are runs of a-z and 0-9 of the lowercased text (other alphabets count for nothing); n-grams count as often
    as they occur in both texts; L is the longest common subsequence of the whole texts."""
    predicted, expected = _words(prediction), _words(reference)
    scores = {f"rouge{n}": _overlap(_ngrams(predicted, n), _ngrams(expected, n)) for n in (1, 2)}
    scores["rougeL"] = Score.of(lcs_length(predicted, expected), len(predicted), len(expected))
    return scores


def lcs_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence. Bit-parallel: Hyyrö, "Bit-parallel LCS-length computation revisited"
    (2004). Bit i of `row` is 0 where the row of the usual table grows at column i; an integer holds a whole row."""
    places: dict = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def normalise_answer(text: str) -> str:
    """SQuAD's (1606.05250) form of an answer: lowercase, without punctuation, articles and surplus spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the prediction is the gold answer, or one of them, in SQuAD's form, else 0.0."""
    return float(any(normalise_answer(prediction) == normalise_answer(r) for r in _each(references)))


def answer_f1(prediction: str, references: str | Sequence[str]) -> float:
    """The best F1 of words in common with a gold answer, in SQuAD's form. Where a form is empty, as that of "the",
    1.0 for two empty ones and else 0.0 (the rule of SQuAD 2's script)."""
    words = normalise_answer(prediction).split()
    return max((_answer_f1(words, normalise_answer(r).split()) for r in _each(references)), default=0.0)


def _each(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats per token. Beyond the largest float, that float: JSON has no infinity."""
    return sys.float_info.max if loss >= math.log(sys.float_info.max) else math.exp(loss)


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _overlap(predicted: Counter, expected: Counter) -> Score:
    return Score.of((predicted & expected).total(), predicted.total(), expected.total())


def _answer_f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    return _overlap(Counter(predicted), Counter(expected)).f1
