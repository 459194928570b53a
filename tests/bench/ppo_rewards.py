"""Reward functions for ppo_study.py, as a user would write them: (prompts, responses, rows) -> a number each."""

SEEN: list[dict] = []  # what `the_words_seen` has scored in this process


def the_words(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """How often a response says "the"."""
    return [float(sum(word.strip('.,:;!?"') == "the" for word in text.lower().split())) for text in responses]


def the_words_seen(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """`the_words`, and a note of every response, so that SFT can be run on the same tokens."""
    SEEN.extend({"prompt": row["prompt"], "completion": text} for row, text in zip(rows, responses, strict=True))
    return the_words(prompts, responses, rows)
