"""What both sides of the benchmark share: arguments, settings, and the form of the result. Imports nothing heavy."""

import argparse
import json
import os
import resource
import statistics
import sys
import time

BATCH = 4
PAIRS = 2  # in a batch of DPO
MAX_LENGTH = 512
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZATION = {"learning_rate": 2e-4, "weight_decay": 0.001, "max_grad_norm": 0.3, "lr_scheduler_type": "cosine"}
WARMUP_RATIO = 0.03
# Large for DPO, so that eight steps move the losses far enough from ln 2 to be compared.
DPO = {"beta": 0.1, "learning_rate": 5e-5}
OPTIONS = ("ckpt", "packing", "nf4", "plain")


def arguments(description: str, *others: str):
    """model, data (JSONL, each row trained on once, in the order of the file), options; `others`: more that must be
    given, by name."""
    parser = argparse.ArgumentParser(description=description)
    add_options(parser)
    for name in others:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--started", type=float, default=time.time(), help="time.time() when the process was spawned")
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="a local checkpoint folder in Hugging Face layout")
    parser.add_argument("--data", required=True, help="JSONL: `input`, `output`; of DPO `prompt`, `chosen`, `rejected`")
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing")
    parser.add_argument("--packing", action="store_true", help=f"rows packed into {MAX_LENGTH} tokens")
    parser.add_argument("--nf4", action="store_true", help="base in NF4, computing in float32")
    parser.add_argument("--plain", action="store_true", help="ours without its fused ops")


def read_rows(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def spread(ratios: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(ratios):7.3f} {min(ratios):7.3f} {max(ratios):7.3f}"


def print_result(name: str, seconds: list[float], losses: list[float], first_step_at: float, started: float):
    """One JSON line. seconds: of each optimizer step. The first two are no part of the median (caches, first pages)."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({
        "name": name,
        "steps": len(seconds),
        "seconds": round(sum(seconds), 3),
        "seconds_per_step": round(statistics.median(seconds[2:] or seconds), 4),
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "start_to_first_step_seconds": round(first_step_at - started, 3),
        "losses": [round(loss, 5) for loss in losses],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }))  # fmt: skip
