"""mini_forge's DPO beside TRL's DPOTrainer on this machine: one run of each in turn, and the ratios.

    python tests/bench/compare_dpo.py --peer-python peers/bin/python --model FOLDER --data gsm8k_pairs.jsonl
                                      [--pairs 3] [--steps 8] [--ckpt] [--nf4] [--plain] [--out results.jsonl]

Run it with mini_forge's own Python; see README.md here. Both sides start from the same adapter (PEFT's), train once
over the same preferences in the same batches of 2, and have the model without its adapter as reference. A token is one
of chosen or rejected as rendered, the prompt included in each, padding not, for both. Exits 1 where either does not
begin at ln 2, or their losses differ.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_common import MAX_LENGTH, PAIRS, read_rows
from compare import EPOCH, HERE, PEER_ENVIRONMENT, SEED, append_records, begin, make_parser, report, run_pairs

from mini_forge.data.batches import plan_epoch
from mini_forge.data.chat import choose_template
from mini_forge.data.pairs import tokenize_pairs
from mini_forge.data.tasks import load_examples
from mini_forge.data.tokenizer import load_tokenizer

OPTIONS = ("ckpt", "nf4", "plain")
SAME_START, SAME_LOSS = 1e-4, 1e-3  # nats: how far a first loss may be from ln 2, and any two losses from each other


def main():
    parser = make_parser(__doc__)
    args = parser.parse_args()
    if args.packing:
        parser.error("--packing: TRL's DPOTrainer has none")
    options = begin(args, OPTIONS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, adapter = write_rows(args, folder), str(folder / "init")
        write_adapter(args, adapter)
        runs = run_pairs(args, "dpo", *rows, [*options, "--adapter", adapter])
    report(runs)
    append_records(args.out, ["dpo", *options], runs)
    sys.exit(not all([same_losses(ours, peer) for ours, peer in runs]))


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
