"""Our side: the same fine-tuning through `mini_forge.train`, and the same JSON line.

    python tests/bench/ours_sft.py --model FOLDER --data ROWS.jsonl [--ckpt] [--packing] [--nf4]

Trains once over the rows. Usually started by compare.py, which gives the peer the same rows in the order of this run.
"""

import sys
import tempfile
import time

from bench_common import BATCH, LORA, MAX_LENGTH, OPTIMIZATION, WARMUP_RATIO, arguments, print_result

args = arguments(__doc__)

import mini_forge  # noqa: E402  (after the clock has started)


def settings(folder: str) -> dict:
    return {
        "task": "text-generation", "strategy": "sft", "model_name": args.model, "dataset": args.data,
        "compute_specs": "high_end", "provider": "unsloth", "output_dir": f"{folder}/run", "device": "cpu",
        "dtype": "float32", "seed": 42,
        "use_4bit": args.nf4, "bnb_4bit_compute_dtype": "float32", "gradient_checkpointing": args.ckpt,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "max_seq_length": MAX_LENGTH, "packing": args.packing, "group_by_length": False, "optim": "adamw_torch",
        "warmup_ratio": WARMUP_RATIO, "eval_split": 0, "logging_steps": 1, "save_strategy": "no",
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": LORA["lora_dropout"], **OPTIMIZATION,
    }  # fmt: skip


def main():
    times, records = [], []

    def on_metrics(record: dict):
        times.append(time.time())
        records.append(record)

    with tempfile.TemporaryDirectory() as folder:
        config = mini_forge.TrainingConfig.from_dict(settings(folder))
        mini_forge.train(config, report=lambda line: print(line, file=sys.stderr), on_metrics=on_metrics)
    ends = [0.0, *(record["seconds"] for record in records)]
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    print_result("mini_forge", seconds, [record["loss"] for record in records], times[0], args.started)


if __name__ == "__main__":
    main()
