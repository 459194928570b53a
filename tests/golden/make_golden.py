"""Make the golden files under tests/golden from transformers, PEFT and bitsandbytes.

    pip install -r tests/golden/requirements-peers.txt     # in an environment of its own
    python tests/golden/make_golden.py                     # all of it, half a minute on one core
    python tests/golden/make_golden.py training chat       # only these parts

Parts: `families` (tests/golden/families/NAME: checkpoint and logits), `training` (tests/golden/training: checkpoint,
dataset, initial adapter and ten reference steps, three ways), `moe_training` (tests/golden/moe_training/FAMILY: the
same for models with experts, with the tokenizer and rows of `training`), `dpo` (tests/golden/dpo: reference steps of
four preference losses), `kto` (tests/golden/kto: the same on labelled rows) and `chat` (tests/golden/chat.json:
rendered templates).
Seeds are fixed, so a second run writes the same bytes on the same machine and versions.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the order of float32 sums, and so the last bit, depends on it

import make_chat
import make_dpo
import make_families
import make_kto
import make_moe_training
import make_training

PARTS = {"families": make_families.main, "training": make_training.main,
         "moe_training": make_moe_training.main, "chat": make_chat.main, "dpo": make_dpo.main,
         "kto": make_kto.main}  # fmt: skip


def main(names: list[str]):
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"unknown part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    for name in names or PARTS:
        PARTS[name](Path(__file__).parent)


if __name__ == "__main__":
    main(sys.argv[1:])
