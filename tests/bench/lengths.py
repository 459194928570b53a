"""Does memory grow linearly in tokens, and not with vocabulary x tokens: peak memory of SFT over the length of a row.

    python tests/bench/lengths.py --model SMOLLM2 --data gsm8k.jsonl [--lengths 512 1024 2048 4096 8192] [--minutes 60]

For each length and each way of recomputing, a process of its own takes two optimizer steps on one row of real text (the
file's rows joined), trained on every token, with the fused ops, in float32, on the CPU. Prints the peak resident set,
the straight line through each column (least squares: bytes a token, what is there at 0 tokens, how far the points are
from it at most), and beside the lengths what the whole float32 logits alone would take, V*T*4 bytes, of which a loss
written plainly keeps at least two. Cells that did not fit into `--minutes` say so and are no part of the fit.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import chain, cycle

RECOMPUTE = ("none", "selective", "full")
STEPS = 2  # one to warm up, one more
MIB = 2**20


def main():
    args = parse()
    if args.length:
        print(json.dumps(measure(args)))
        return
    end, found = time.monotonic() + args.minutes * 60, {}
    for length in args.lengths:
        for recompute in RECOMPUTE:
            record = measure_apart(length, recompute, end)
            print(length, recompute, record, file=sys.stderr, flush=True)
            if record is not None:
                found[length, recompute] = record
    print_table(args.lengths, found)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local checkpoint folder in Hugging Face layout")
    parser.add_argument("--data", required=True, help="JSONL rows with `input` and `output`")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--minutes", type=float, default=60, help="what has not ended by then is left out")
    parser.add_argument("--length", type=int, help="measure this length in this process (used within)")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="measure this in this process (used within)")
    return parser.parse_args()


def measure_apart(length: int, recompute: str, end: float) -> dict | None:
    """The record of a process for one cell; None where it does not end before `end` (of time.monotonic)."""
    command = [sys.executable, __file__, *sys.argv[1:], "--length", str(length), "--recompute", recompute]
    left = end - time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 0.01))
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        sys.exit(f"{done.stderr}\nlength {length}, recompute {recompute} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args) -> dict:
    """Train two steps on one row. peak: of the process, bytes; before: the peak until the model stands."""
    import torch

    from mini_forge.data.batches import collate
    from mini_forge.io.weights import load_base
    from mini_forge.model.lora import LoraSpec, inject
    from mini_forge.providers import PROVIDERS
    from mini_forge.training.loop import peak_memory_bytes
    from mini_forge.training.malloc import keep_freed_memory
    from mini_forge.training.optim import clip_grad_norm, make_optimizer, parameter_groups
    from mini_forge.training.sft import sft_loss

    keep_freed_memory()
    cpu = torch.device("cpu")
    provider = PROVIDERS["unsloth"]()
    model = load_base(args.model, torch.float32, cpu, ops=provider.ops).train()
    inject(model, LoraSpec(16, 32), torch.Generator().manual_seed(0))
    model.recompute = None if args.recompute == "none" else args.recompute
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw_torch", parameter_groups(named, 0.001), 2e-4, 0.001, cpu)
    batch, before, losses = collate([joined_row(args)]), peak_memory_bytes(cpu), []
    for _ in range(STEPS):
        result = sft_loss(model, batch)
        (result.total / result.count).backward()
        clip_grad_norm([p for _, p in named], 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(float(result.total.detach()) / result.count)
    return {"peak": peak_memory_bytes(cpu), "before": before, "losses": losses, "vocab": model.spec.vocab_size}


def joined_row(args):
    """A document of `length` inputs, each with a target to train on: the texts of the file, one after another."""
    import numpy as np

    from mini_forge.data.batches import Document
    from mini_forge.data.tokenizer import load_tokenizer

    tokenizer, ids = load_tokenizer(args.model), []
    with open(args.data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for text in cycle(chain.from_iterable((row["input"], row["output"]) for row in rows)):
        ids += tokenizer.encode(text + "\n")
        if len(ids) > args.length:
            break
    return Document(np.array(ids[: args.length + 1], dtype=np.int32), np.arange(args.length + 1) > 0, line=1)


def print_table(lengths: list[int], found: dict):
    print("| tokens | the logits alone | " + " | ".join(f"recompute {name}" for name in RECOMPUTE) + " |")
    print("|---" * (2 + len(RECOMPUTE)) + "|")
    vocab = next(iter(found.values()))["vocab"]
    for length in lengths:
        cells = [found.get((length, name)) for name in RECOMPUTE]
        text = " | ".join("not measured" if cell is None else f"{cell['peak'] / MIB:,.0f} MiB" for cell in cells)
        print(f"| {length} | {vocab * length * 4 / MIB:,.0f} MiB | {text} |")
    fits = [line_through([(n, found[n, name]["peak"]) for n in lengths if (n, name) in found]) for name in RECOMPUTE]
    rows = {
        "bytes a token": [f"{vocab * 4:,}", *(f"{slope:,.0f}" for slope, _, _ in fits)],
        "at 0 tokens": ["0", *(f"{start / MIB:,.0f} MiB" for _, start, _ in fits)],
        "off the line by at most": ["0", *(f"{off / MIB:,.0f} MiB" for _, _, off in fits)],
    }
    for label, cells in rows.items():
        print(f"| {label} | " + " | ".join(cells) + " |")


def line_through(points: list[tuple[int, int]]) -> tuple[float, float, float]:
    """(slope, intercept, largest residual) of the least-squares line; NaN where fewer than 3 points leave none over."""
    if len(points) < 3:
        return (float("nan"),) * 3
    n, mean_x, mean_y = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    mean_x, mean_y = mean_x / n, mean_y / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    start = mean_y - slope * mean_x
    return slope, start, max(abs(y - start - slope * x) for x, y in points)


if __name__ == "__main__":
    main()
