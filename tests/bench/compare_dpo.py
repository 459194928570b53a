"""mini_forge's DPO beside TRL's DPOTrainer on this machine: one run of each in turn, and the ratios.

    python tests/bench/compare_dpo.py --peer-python peers/bin/python --model FOLDER --data gsm8k_pairs.jsonl
                                      [--pairs 3] [--steps 8] [--ckpt] [--nf4] [--out results.jsonl]

Run it with mini_forge's own Python; see README.md here. Both sides start from the same adapter (PEFT's), train once
over the same preferences in the same batches of 2, and have the model without its adapter as reference. A token is one
of chosen or rejected as rendered, the prompt included in each, padding not, for both. Exits 1 where either does not
begin at ln 2, or their losses differ.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import MAX_LENGTH, PAIRS, add_options, read_rows
from compare import EPOCH, HERE, PEER_ENVIRONMENT, SEED, cpu_name, measure, report

from mini_forge.data.batches import plan_epoch
from mini_forge.data.chat import choose_template
from mini_forge.data.pairs import tokenize_pairs
from mini_forge.data.tasks import load_examples
from mini_forge.data.tokenizer import load_tokenizer

OPTIONS = ("ckpt", "nf4")
SAME_START, SAME_LOSS = 1e-4, 1e-3  # nats: how far a first loss may be from ln 2, and any two losses from each other


def main():
    args = parse()
    options = [f"--{name}" for name in OPTIONS if getattr(args, name)]
    print(f"{time.strftime('%Y-%m-%d')} {cpu_name()}, {os.cpu_count()} cores; {' '.join(options) or 'plain'}; "
          f"{args.steps} steps, {args.pairs} pairs of runs")  # fmt: skip
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours_rows, peer_rows, tokens = write_rows(args, folder)
        print(f"{tokens} tokens a run")
        adapter = str(folder / "init")
        write_adapter(args, adapter)
        given = [*options, "--adapter", adapter]
        for _ in range(args.pairs):
            ours = measure([sys.executable, HERE / "ours_dpo.py"], args.model, ours_rows, given, {}, tokens)
            peer = measure([args.peer_python, HERE / "peer_dpo.py"], args.model, peer_rows, given, PEER_ENVIRONMENT,
                           tokens)  # fmt: skip
            runs.append((ours, peer))
    report(runs)
    if args.out:
        with open(args.out, "a", encoding="utf-8") as out:
            out.writelines(json.dumps({"options": ["dpo", *options], **run}) + "\n" for pair in runs for run in pair)
    sys.exit(not all([same_losses(ours, peer) for ours, peer in runs]))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--peer-python", required=True, help="Python of the environment with TRL and PEFT")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs, one of each side")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run")
    parser.add_argument("--out", help="append every run's record to this JSONL file")
    args = parser.parse_args()
    if args.packing:
        parser.error("--packing: TRL's DPOTrainer has none")
    return args


def write_adapter(args, folder: str):
    """The initial adapter of both sides, drawn by PEFT."""
    command = [args.peer_python, HERE / "peer_loop.py", "init", "--model", args.model, "--adapter", folder]
    done = subprocess.run(command, env={**os.environ, **PEER_ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{command[1]} ended with {done.returncode}")


def write_rows(args, folder: Path) -> tuple[Path, Path, int]:
    """The preferences for ours, the same for the peer in the order in which ours will take them, and their tokens.

    Only those that neither side has to cut: ours would shorten the prompt, the peer the responses."""
    rows, tokenizer = read_rows(args.data), load_tokenizer(args.model)
    template = choose_template(None, args.model, tokenizer, "text-generation")
    documents, _ = tokenize_pairs(load_examples(args.data, "text-generation", "dpo"), template, tokenizer)
    lengths = [[len(side.ids) for side in document.sides] for document in documents]
    fitting = [i for i, sides in enumerate(lengths) if max(sides) < MAX_LENGTH]  # one is left for the peer's line break
    n = args.steps * PAIRS
    if len(documents) < len(rows) or len(fitting) < n:
        sys.exit(f"{args.data}: {len(fitting)} pairs of less than {MAX_LENGTH} tokens; {n} are needed")
    chosen = fitting[:n]
    order = [i for batch in plan_epoch([1] * n, PAIRS, seed=SEED, epoch=EPOCH) for i in batch]
    ours, peer = folder / "ours.jsonl", folder / "peer.jsonl"
    ours.write_text("".join(json.dumps(rows[i]) + "\n" for i in chosen), encoding="utf-8")
    peer.write_text("".join(json.dumps(rows[chosen[i]]) + "\n" for i in order), encoding="utf-8")
    return ours, peer, sum(sum(lengths[i]) for i in chosen)


def same_losses(ours: dict, peer: dict) -> bool:
    """Whether both begin at ln 2 and stay together; prints how far they are apart."""
    starts = [abs(run["losses"][0] - math.log(2)) for run in (ours, peer)]
    differences = [abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True)]
    print(f"first losses within {max(starts):.1e} of ln 2, losses differ by up to {max(differences):.1e}, "
          f"in the median by {statistics.median(differences):.1e}")  # fmt: skip
    return max(starts) <= SAME_START and max(differences) <= SAME_LOSS


if __name__ == "__main__":
    main()
