"""Our side's settings, and one run of `mini_forge.train` as a JSON line."""

import sys
import tempfile
import time

from bench_common import LORA, MAX_LENGTH, OPTIMIZATION, WARMUP_RATIO, print_result

import mini_forge
from mini_forge.quick_imports import quick_imports


def settings(args) -> dict:
    """What SFT and DPO have in common; `args` of `bench_common.arguments`."""
    return {
        "task": "text-generation", "model_name": args.model, "dataset": args.data, "compute_specs": "high_end",
        "provider": "huggingface" if args.plain else "unsloth", "device": "cpu", "dtype": "float32", "seed": 42,
        "use_4bit": args.nf4, "bnb_4bit_compute_dtype": "float32", "gradient_checkpointing": args.ckpt,
        "recompute": "selective",
        "gradient_accumulation_steps": 1, "num_train_epochs": 1, "max_seq_length": MAX_LENGTH,
        "packing": args.packing, "group_by_length": False, "optim": "adamw_torch", "warmup_ratio": WARMUP_RATIO,
        "eval_split": 0, "logging_steps": 1, "save_strategy": "no",
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": LORA["lora_dropout"], **OPTIMIZATION,
    }  # fmt: skip


def run(settings: dict, started: float):
    """Train, and print the result. started: time.time() when the process was spawned."""
    times, records = [], []

    def on_metrics(record: dict):
        times.append(time.time())
        records.append(record)

    with quick_imports(is_own_process=True):  # as the command line does
        train = mini_forge.train
    with tempfile.TemporaryDirectory() as folder:
        config = mini_forge.TrainingConfig.from_dict({**settings, "output_dir": f"{folder}/run"})
        train(config, report=lambda line: print(line, file=sys.stderr), on_metrics=on_metrics)
    ends = [0.0, *(record["seconds"] for record in records)]
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    print_result("mini_forge", seconds, [record["loss"] for record in records], times[0], started)
