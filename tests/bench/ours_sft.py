"""Our side: the same fine-tuning through `mini_forge.train`, and the same JSON line.

    python tests/bench/ours_sft.py --model FOLDER --data ROWS.jsonl [--ckpt] [--packing] [--nf4] [--plain]

Trains once over the rows. Usually started by compare.py, which gives the peer the same rows in the order of this run.
"""

from bench_common import BATCH, arguments

args = arguments(__doc__)

from ours_common import run, settings  # noqa: E402  (after the clock has started)

if __name__ == "__main__":
    run({**settings(args), "strategy": "sft", "per_device_train_batch_size": BATCH}, args.started)
