"""mini_forge beside TRL+PEFT on this machine: one run of each in turn, and the ratios of each pair.

    python tests/bench/compare.py --peer-python peers/bin/python --model FOLDER --data gsm8k.jsonl
                                  [--pairs 3] [--steps 8] [--ckpt] [--packing] [--nf4] [--plain] [--out results.jsonl]

Run it with mini_forge's own Python; see README.md here for the environments and the data. Both sides train once over
the same rows, in the same batches of 4 (packed: each packs the same rows its own way), and a token is a token of a row
as rendered, prompt included, padding not, for both.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import BATCH, MAX_LENGTH, OPTIONS, add_options, read_rows, spread

from mini_forge.data.batches import plan_epoch
from mini_forge.data.chat import choose_template
from mini_forge.data.tasks import load_examples
from mini_forge.data.tokenizer import load_tokenizer

HERE = Path(__file__).parent
SEED, EPOCH = 42, 0
PACKED_ROWS = 2  # rows fed for each row place of a batch when packing: about two rows of GSM8K share 512 tokens
# With glibc's defaults the peer hands its large buffers back to the system after every use, and was several times
# slower at times; these limits keep them, which is what someone who cares about speed would set.
PEER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def main():
    args = make_parser(__doc__).parse_args()
    options = begin(args, OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        pairs = run_pairs(args, "sft", *write_rows(args, Path(folder)), options)
    report(pairs)
    append_records(args.out, options, pairs)


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--peer-python", required=True, help="Python of the environment with TRL and PEFT")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs, one of each side")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run (packed: about as many)")
    parser.add_argument("--out", help="append every run's record to this JSONL file")
    return parser


def begin(args, names: tuple[str, ...]) -> list[str]:
    """Print what is compared. Returns those of the options `names` that are given."""
    options = [f"--{name}" for name in names if getattr(args, name)]
    print(f"{time.strftime('%Y-%m-%d')} {cpu_name()}, {os.cpu_count()} cores; {' '.join(options) or 'no options'}; "
          f"{args.steps} steps, {args.pairs} pairs of runs")  # fmt: skip
    return options


def run_pairs(args, strategy: str, ours_rows: Path, peer_rows: Path, tokens: int, given: list[str]) -> list[tuple]:
    """The records of ours_STRATEGY.py and peer_STRATEGY.py, run in turn on `tokens` tokens."""
    print(f"{tokens} tokens a run")
    pairs = []
    for _ in range(args.pairs):
        ours = measure([sys.executable, HERE / f"ours_{strategy}.py"], args.model, ours_rows, given, {}, tokens)
        peer = measure([args.peer_python, HERE / f"peer_{strategy}.py"], args.model, peer_rows, given,
                       PEER_ENVIRONMENT, tokens)  # fmt: skip
        pairs.append((ours, peer))
    return pairs


def append_records(path: str | None, options: list[str], pairs: list[tuple[dict, dict]]):
    if path:
        with open(path, "a", encoding="utf-8") as out:
            out.writelines(json.dumps({"options": options, **run}) + "\n" for pair in pairs for run in pair)


def write_rows(args, folder: Path) -> tuple[Path, Path, int]:
    """The rows for ours, the same rows for the peer in the order in which ours will take them, and their tokens."""
    n = args.steps * BATCH * (PACKED_ROWS if args.packing else 1)
    rows = read_rows(args.data)[:n]
    if len(rows) < n:
        sys.exit(f"{args.data}: {len(rows)} rows; {n} are needed for {args.steps} steps")
    ours, peer = folder / "ours.jsonl", folder / "peer.jsonl"
    order = range(n)
    if not args.packing:
        batches = plan_epoch([1] * n, BATCH, 1, False, False, MAX_LENGTH, SEED, EPOCH)
        order = [index for batch in batches for index in batch]
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    peer.write_text("".join(json.dumps(rows[i]) + "\n" for i in order), encoding="utf-8")
    return ours, peer, count_tokens(args.model, ours)


def count_tokens(model: str, rows: Path) -> int:
    tokenizer = load_tokenizer(model)
    template = choose_template(None, model, tokenizer, "text-generation")
    examples = load_examples(str(rows), "text-generation")
    return sum(min(len(tokenizer.encode(template.render(e, None).text)), MAX_LENGTH) for e in examples)


def measure(command: list, model: str, rows: Path, options: list[str], environment: dict, tokens: int) -> dict:
    """One process from start to end. Returns its record, with `tokens_per_second` over all steps."""
    arguments = ["--model", model, "--data", rows, *options, "--started", str(time.time())]
    done = subprocess.run([*command, *arguments], env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{command[1]} ended with {done.returncode}")
    record = json.loads(done.stdout.splitlines()[-1])
    record |= {"tokens": tokens, "tokens_per_second": round(tokens / record["seconds"], 1)}
    print(f"{record['name']:10} {record['tokens_per_second']:7.1f} tok/s {record['seconds_per_step']:7.2f} s/step "
          f"{record['peak_rss_bytes'] / 2**30:5.2f} GiB {record['start_to_first_step_seconds']:6.1f} s to first step, "
          f"loss {record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}", flush=True)  # fmt: skip
    return record


def report(pairs: list[tuple[dict, dict]]):
    """Ours over the peer's, pair by pair."""
    print(f"\n{'ours / TRL+PEFT':32} {'median':>7} {'min':>7} {'max':>7}")
    for title, key in (("tokens/s, all steps", "tokens_per_second"), ("median seconds per step", "seconds_per_step"),
                       ("peak resident memory", "peak_rss_bytes"),
                       ("start to end of first step", "start_to_first_step_seconds")):  # fmt: skip
        ratios = [ours[key] / peer[key] for ours, peer in pairs]
        print(f"{title:32} {spread(ratios)}")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
