"""Makes preferences.jsonl from debian_summaries.jsonl: a synopsis, or the words the description happens to begin with?

`chosen` is the synopsis the package's maintainer wrote. `rejected` is what a lazy summary does: the beginning of the
description, cut between words to no more than the synopsis's length, so that length alone tells nothing.

    python configs/quickstart/make_preferences.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
ROWS = 400
PROMPT = "Summarize the following document:\n{}"  # as the summarization task asks


def preferences(rows: list[dict]) -> list[dict]:
    """A pair for each of the first ROWS packages whose synopsis is not itself the beginning of its description."""
    pairs = []
    for row in rows:
        copied = beginning(row["document"], len(row["summary"]))
        if copied and copied.lower() != row["summary"].lower():
            prompt = PROMPT.format(row["document"])
            pairs.append({"prompt": prompt, "chosen": row["summary"], "rejected": copied})
    return pairs[:ROWS]


def beginning(text: str, characters: int) -> str:
    """The first whole words of a text, of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= characters else text[: characters + 1].rpartition(" ")[0]


def main():
    rows = [json.loads(line) for line in (HERE / "debian_summaries.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = preferences(rows)
    text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (HERE / "preferences.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(pairs)} pairs")


if __name__ == "__main__":
    main()
