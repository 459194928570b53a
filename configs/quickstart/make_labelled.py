"""Makes labelled.jsonl from preferences.jsonl: single summaries with a label, as KTO takes them.

Of every first pair the chosen response is kept, with label true, of every second one the rejected, with label false: no
prompt comes twice, so nothing can be learnt by comparing two answers to it.

    python configs/quickstart/make_labelled.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
ROWS = 240


def labelled(pairs: list[dict]) -> list[dict]:
    """A row for each of the first ROWS pairs, labels in turn."""
    rows = []
    for number, pair in enumerate(pairs[:ROWS]):
        is_desirable = number % 2 == 0
        completion = pair["chosen" if is_desirable else "rejected"]
        rows.append({"prompt": pair["prompt"], "completion": completion, "label": is_desirable})
    return rows


def main():
    pairs = [json.loads(line) for line in (HERE / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = labelled(pairs)
    (HERE / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
