"""As good as the peers: held-out loss of ours and of a plain transformers+PEFT loop after the same training.

    python tests/bench/quality.py --peer-python peers/bin/python --model FOLDER --data gsm8k.jsonl
                                  [--rows 300] [--steps 30] [--held-out 60]

The same rows in the same order, the same initial adapter (PEFT's), float32. Both adapters, and the base, are judged by
transformers+PEFT on rows that neither has seen. Exits 1 if ours is more than 1% worse.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_common import LORA, MAX_LENGTH, OPTIMIZATION, WARMUP_RATIO, read_rows
from compare import PEER_ENVIRONMENT
from safetensors.torch import load_file

import mini_forge
from mini_forge.data.batches import plan_epoch
from mini_forge.data.tokenizer import load_tokenizer

BOUND = 1.01
SEED = 42
MICROBATCHES = 2  # of ours in a step: the peer goes row by row, and neither may matter


def main():
    args = parse()
    rows_per_step = args.rows // args.steps
    size = rows_per_step // MICROBATCHES
    if rows_per_step * args.steps != args.rows or size * MICROBATCHES != rows_per_step:
        sys.exit(f"--rows {args.rows}: must be a multiple of {MICROBATCHES} × --steps {args.steps}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = fitting(read_rows(args.data), args.model)[: args.rows + args.held_out]
        write(folder / "train.jsonl", rows[: args.rows])
        write(folder / "held_out.jsonl", rows[args.rows :])
        batches = plan_epoch([1] * args.rows, size, MICROBATCHES, False, False, MAX_LENGTH, SEED, 0)
        write(folder / "peer.jsonl", [rows[i] for batch in batches for i in batch])
        init, peer, ours = (str(folder / part) for part in ("init", "peer", "ours"))
        call_peer(args, "init", "--adapter", init)
        our_losses = train_ours(args, folder, init, ours, size)
        peer_losses = call_peer(args, "train", "--adapter", init, "--data", str(folder / "peer.jsonl"), "--out", peer,
                                "--rows-per-step", str(rows_per_step))["losses"]  # fmt: skip
        held_out = ["eval", "--data", str(folder / "held_out.jsonl")]
        base, theirs, mine = (call_peer(args, *held_out, *which)["loss"] for which in
                              ([], ["--adapter", peer], ["--adapter", ours]))  # fmt: skip
        print(f"held-out loss: base {base:.4f}, transformers+PEFT {theirs:.4f}, mini_forge {mine:.4f}, "
              f"ratio {mine / theirs:.5f} (at most {BOUND})")  # fmt: skip
        differences = [abs(a / b - 1) for a, b in zip(our_losses, peer_losses, strict=True)]
        print(f"per-step losses differ by up to {max(differences):.1e} relative, "
              f"final adapters by up to {adapter_difference(ours, peer):.1e} absolute")  # fmt: skip
    sys.exit(mine > theirs * BOUND)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=60)
    return parser.parse_args()


def fitting(rows: list[dict], model: str) -> list[dict]:
    """The rows that no side has to truncate (100 tokens are left for the template)."""
    encode = load_tokenizer(model).encode
    return [row for row in rows if len(encode(row["input"] + row["output"])) <= MAX_LENGTH - 100]


def write(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def call_peer(args, action: str, *options: str) -> dict:
    command = [args.peer_python, Path(__file__).with_name("peer_loop.py"), action, "--model", args.model, *options]
    done = subprocess.run(command, env={**os.environ, **PEER_ENVIRONMENT}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"peer_loop.py {action} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def train_ours(args, folder: Path, init: str, out: str, size: int) -> list[float]:
    config = mini_forge.TrainingConfig.from_dict({
        "task": "text-generation", "model_name": args.model, "dataset": str(folder / "train.jsonl"), "output_dir": out,
        "compute_specs": "high_end", "device": "cpu", "dtype": "float32", "use_4bit": False, "init_adapter": init,
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": 0.0, "max_seq_length": MAX_LENGTH,
        "per_device_train_batch_size": size, "gradient_accumulation_steps": MICROBATCHES, "num_train_epochs": 1,
        "group_by_length": False, "gradient_checkpointing": False, "optim": "adamw_torch",
        "warmup_ratio": WARMUP_RATIO, "eval_split": 0, "seed": SEED, "logging_steps": 1,
        "save_strategy": "no", **OPTIMIZATION,
    })  # fmt: skip
    result = mini_forge.train(config, report=lambda line: print(line, file=sys.stderr))
    return [record["loss"] for record in result.metrics if "loss" in record]


def adapter_difference(ours: str, peer: str) -> float:
    a, b = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (ours, peer))
    if a.keys() != b.keys():
        sys.exit(f"the adapters have different tensors: {sorted(a.keys() ^ b.keys())[:4]}")
    return max(float((a[name] - b[name]).abs().max()) for name in a)


if __name__ == "__main__":
    main()
