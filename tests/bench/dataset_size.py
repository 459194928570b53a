"""Does the size of the dataset matter: start, peak memory and steps a second of one model on 20k, 100k and 1M rows.

    python tests/bench/dataset_size.py --model MODEL --data gsm8k.jsonl [--sizes 20000 100000 1000000] [--steps 40]

Run it with mini_forge's own Python. The rows of the file are repeated, each with a running number before its `input`.
For each size, in a process of its own and twice (the second time the tokens of a large file are in the cache): seconds
of `prepare` (every row checked, rendered, encoded) and the most memory resident until then; then `--steps` optimizer
steps of `train` on batches drawn from all of the data, the most memory until their end, and their speed without the
first. Rows and cache lie in `--folder` (default: a temporary folder; 3.5 kB a row are enough). Linux only: it reads
/proc.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

SETTINGS = {
    "task": "text-generation",
    "strategy": "sft",
    "compute_specs": "low_end",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "use_4bit": False,
    "gradient_checkpointing": False,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch",
    "max_seq_length": 512,
    "eval_split": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
    "device": "cpu",
}


def main():
    args = parse()
    if args.side:
        print(json.dumps(run(args)))
        return
    from compare import cpu_name

    print(f"{time.strftime('%Y-%m-%d')} {cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    print("     rows    file   start    prepare  its peak      peak  steps/s  tokens/s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in args.sizes:
            rows = write_rows(folder, Path(args.data), size)
            for start in ("first", "second"):
                report(size, rows, start, measure(args, folder, rows))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local checkpoint folder in Hugging Face layout")
    parser.add_argument("--data", required=True, help="JSONL rows with `input` and `output`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", help="where rows and cache are written and stay; default: a temporary folder")
    parser.add_argument("--side", help="train on this file once and print a record (used within)")
    return parser.parse_args()


def write_rows(folder: Path, source: Path, size: int) -> Path:
    path = folder / f"rows_{size}.jsonl"
    with source.open(encoding="utf-8") as lines:  # not splitlines: U+2028 may stand in a JSON string
        originals = [json.loads(line) for line in lines]
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(originals), size)):
            file.write(json.dumps({**row, "input": f"{number}. {row['input']}"}) + "\n")
    return path


def measure(args, folder: Path, rows: Path) -> dict:
    """One process that prepares and trains on `rows`."""
    command = [sys.executable, __file__, "--model", args.model, "--data", args.data, "--steps", str(args.steps)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.resolve() / "cache")}
    done = subprocess.run([*command, "--side", str(rows)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\ntraining on {rows} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run(args) -> dict:
    """`prepare` alone, then `train`, which prepares again from what is cached by then."""
    import mini_forge
    from mini_forge.prepare import prepare
    from mini_forge.run import train

    with tempfile.TemporaryDirectory() as output:
        config = mini_forge.TrainingConfig.from_dict(
            {**SETTINGS, "model_name": args.model, "dataset": args.side, "max_steps": args.steps, "output_dir": output}
        )
        began = time.perf_counter()
        prepare(config)
        seconds, peak = time.perf_counter() - began, memory("VmHWM")
        records = train(config, overwrite=True, report=lambda line: None).metrics
    steps = [record for record in records if "loss" in record]
    first, last = steps[1], steps[-1]  # without the first step, which is slow on any data
    took = last["seconds"] - first["seconds"]
    return {
        "prepare_seconds": seconds,
        "prepare_peak": peak,
        "peak": memory("VmHWM"),
        "steps_per_second": (last["step"] - first["step"]) / took,
        "tokens_per_second": (last["tokens"] - first["tokens"]) / took,
    }


def memory(field: str) -> int:
    """Bytes of "VmHWM", the most resident so far. Mapped pages count from the first look at them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def report(size: int, rows: Path, start: str, record: dict):
    mib = 2**20
    print(f"{size:>9,} {rows.stat().st_size / mib:5.0f}MiB {start:>7} {record['prepare_seconds']:8.2f} s "
          f"{record['prepare_peak'] / mib:5.0f} MiB {record['peak'] / mib:5.0f} MiB "
          f"{record['steps_per_second']:8.2f} {record['tokens_per_second']:9.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
