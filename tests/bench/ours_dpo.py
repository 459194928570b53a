"""Our side of DPO: the same preference tuning through `mini_forge.train`, and the same JSON line.

    python tests/bench/ours_dpo.py --model FOLDER --data PAIRS.jsonl --adapter FOLDER [--ckpt] [--nf4] [--plain]

Trains once over the pairs, from the initial adapter (PEFT's format). Usually started by compare_dpo.py, which gives the
peer the same adapter and the same pairs in the order of this run.
"""

from bench_common import DPO, PAIRS, arguments

args = arguments(__doc__, "adapter")

from ours_common import run, settings  # noqa: E402  (after the clock has started)

if __name__ == "__main__":
    preferences = {"strategy": "dpo", "per_device_train_batch_size": PAIRS, "init_adapter": args.adapter, **DPO}
    run({**settings(args), **preferences}, args.started)
