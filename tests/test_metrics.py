"""Scores: golden values of the rouge_score 0.1.2 package, arithmetic by hand, and a slow oracle."""

import math
import random
import sys

import pytest

from mini_forge.inference.metrics import (
    Score,
    answer_f1,
    exact_match,
    lcs_length,
    normalise_answer,
    perplexity,
    rouge,
)

# rouge_score.rouge_scorer.RougeScorer([...], use_stemmer=False).score(reference, prediction): precision, recall, F
ROUGE_SCORE = [
    (
        "The quick brown fox—jumps over the lazy dog!",
        "A quick, brown dog jumps over the fox.",
        {
            "rouge1": (0.777777777778, 0.875, 0.823529411765),
            "rouge2": (0.375, 0.428571428571, 0.4),
            "rougeL": (0.555555555556, 0.625, 0.588235294118),
        },
    ),
    (
        "It's 3.14 km; don't panic\nsecond line here",
        "it s 3 14 km\nline second, DON'T panic",
        {
            "rouge1": (0.909090909091, 1.0, 0.952380952381),
            "rouge2": (0.6, 0.666666666667, 0.631578947368),
            "rougeL": (0.727272727273, 0.8, 0.761904761905),
        },
    ),
    (
        "naïve café in 2024",
        "naive cafe in 2024",
        {
            "rouge1": (0.4, 0.5, 0.444444444444),
            "rouge2": (0.25, 0.333333333333, 0.285714285714),
            "rougeL": (0.4, 0.5, 0.444444444444),
        },
    ),
    ("", "nothing said", dict.fromkeys(("rouge1", "rouge2", "rougeL"), (0.0, 0.0, 0.0))),
    ("one", "one", {"rouge1": (1.0, 1.0, 1.0), "rouge2": (0.0, 0.0, 0.0), "rougeL": (1.0, 1.0, 1.0)}),
]


@pytest.mark.parametrize(("prediction", "reference", "expected"), ROUGE_SCORE)
def test_rouge_equals_the_rouge_score_package(prediction, reference, expected):
    scores = rouge(prediction, reference)
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name] == pytest.approx(values, abs=1e-11), name


def test_rouge_by_hand():
    """prediction "the cat sat on the mat" (6 words, 5 pairs), reference "the cat was on mat" (5 words, 4 pairs).

    Words in common: the, cat, on, mat = 4 (the second "the" has no partner). Pairs in common: "the cat" = 1.
    Subsequence: the cat on mat = 4."""
    scores = rouge("the cat sat on the mat", "the cat was on mat")
    assert scores["rouge1"] == pytest.approx((4 / 6, 4 / 5, 8 / 11))
    assert scores["rouge2"] == pytest.approx((1 / 5, 1 / 4, 2 / 9))
    assert scores["rougeL"] == pytest.approx((4 / 6, 4 / 5, 8 / 11))


def test_repeated_words_count_as_often_as_both_have_them():
    """ "no no no" against "no yes no": 2 of 3 either way; the pairs "no no" ×2 and "no yes", "yes no": none."""
    scores = rouge("no no no", "no yes no")
    assert scores["rouge1"] == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert scores["rouge2"] == Score(0.0, 0.0, 0.0)


def test_lcs_length_equals_the_table_of_the_textbook():
    def textbook(a, b):
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abcd", k=draw.randrange(80))) for _ in range(2))
        assert lcs_length(a, b) == textbook(a, b), (a, b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("theatre and banana", "theatre and banana"),
        ("U.S.A.", "usa"),
        ("the-a", "thea"),  # punctuation goes first, as in SQuAD's script
        ("A", ""),
        ("x—the—y", "x— —y"),  # an article leaves a gap
    ],
)
def test_answers_are_normalised_as_squads_script_does(text, expected):
    assert normalise_answer(text) == expected


def test_exact_match_takes_any_gold_answer():
    assert exact_match("the Eiffel Tower.", ["Paris", "Eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["Paris", "Eiffel tower"]) == 0.0


def test_answer_f1_is_the_best_over_gold_answers():
    """ "in Paris France" against "Paris": 1 common word of 3 and 1, F1 = 2/4; against "paris, france": 2·2/5."""
    assert answer_f1("in Paris France", ["Paris"]) == pytest.approx(1 / 2)
    assert answer_f1("in Paris France", ["Paris", "paris, france", "Rome"]) == pytest.approx(4 / 5)
    assert answer_f1("Berlin", ["Paris"]) == 0.0


def test_empty_answers_match_only_each_other():
    assert answer_f1("the", ["a"]) == 1.0
    assert answer_f1("", ["Paris"]) == 0.0
    assert answer_f1("Paris", ["the"]) == 0.0


def test_perplexity_is_exp_of_the_loss_and_stays_finite():
    assert perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity(0.0) == 1.0
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(1e6) == sys.float_info.max


def test_one_answer_may_be_given_alone_and_none_is_never_met():
    assert exact_match("Paris", "paris") == answer_f1("Paris", "paris") == 1.0
    assert exact_match("Paris", []) == answer_f1("Paris", []) == 0.0
    assert math.isnan(perplexity(math.nan))
