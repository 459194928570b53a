"""What each lever buys: the same fine-tuning steps with one lever more a row, each row a process of its own, in turn.

    python tests/bench/ladder.py --model FOLDER --data gsm8k.jsonl [--rounds 3] [--steps 8] [--device cuda]

Prints a table: tokens/s of the median step, over all steps, and peak memory, medians over the rounds. A token is a
token of a row as rendered, for every row of the table alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace

# Each with those before it.
LEVERS = ["padded rows, all logits", "padding-free", "head on trained tokens, in chunks", "fused ops",
          "shared beginnings, last layer where trained", "matrices in bfloat16, as stored"]  # fmt: skip
BESIDE = ["packed to 512 tokens", "recompute selective", "recompute full", "base in NF4"]  # each beside all levers
ROWS = LEVERS + BESIDE
BATCH, MAX_LENGTH = 4, 512


def main():
    args = parse()
    if args.row is not None:
        print(json.dumps(measure(args)))
        return
    runs = {row: [] for row in range(len(ROWS))}
    for _ in range(args.rounds):
        for row, found in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--row", str(row)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{done.stderr}\n{ROWS[row]} ended with {done.returncode}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(ROWS[row], found[-1], file=sys.stderr, flush=True)
    print(f"| {'lever':46} | tokens/s, median step | over all steps | peak memory |")
    print("|---|---|---|---|")
    for row, found in runs.items():
        step, whole, peak = (statistics.median(run[key] for run in found) for key in ("median", "overall", "peak"))
        print(f"| {'+ ' * (row > 0) + ROWS[row]:46} | {step:,.0f} | {whole:,.0f} | {peak / 2**30:.2f} GiB |")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--row", type=int, help="measure this row in this process")
    return parser.parse_args()


def measure(args) -> dict:
    """Train some steps as the row says."""
    import torch

    from mini_forge.io.weights import load_base
    from mini_forge.model.lora import LoraSpec, inject
    from mini_forge.providers import PROVIDERS
    from mini_forge.training.loop import peak_memory_bytes
    from mini_forge.training.malloc import keep_freed_memory
    from mini_forge.training.optim import clip_grad_norm, make_optimizer, parameter_groups

    keep_freed_memory()
    torch.manual_seed(0)
    name, dtype = ROWS[args.row], getattr(torch, args.dtype)
    is_fused = args.row >= LEVERS.index("fused ops")
    provider = PROVIDERS["unsloth" if is_fused else "huggingface"](args.device)
    quantization = "nf4" if name == "base in NF4" else None
    is_kept = args.row >= LEVERS.index("matrices in bfloat16, as stored")
    ops = provider.ops if is_kept else replace(provider.ops, stored_products=None)
    model = load_base(args.model, dtype, args.device, quantization, compute_dtype=dtype, ops=ops).train()
    inject(model, LoraSpec(16, 32), torch.Generator().manual_seed(0))
    model.recompute = {"recompute selective": "selective", "recompute full": "full"}.get(name)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw_torch", parameter_groups(named, 0.001), 2e-4, 0.001, args.device)
    seconds, tokens = [], []
    for documents in batches(args, is_packed=name.startswith("packed")):
        began = time.perf_counter()
        total, count = loss(args.row, model, documents)
        (total / count).backward()
        clip_grad_norm([p for _, p in named], 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        float(total.detach())
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(d.inputs for d in documents))
    rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
    return {"median": statistics.median(rates[2:]), "overall": sum(tokens) / sum(seconds),
            "peak": peak_memory_bytes(torch.device(args.device)), "loss": float(total.detach() / count)}  # fmt: skip


def batches(args, is_packed: bool) -> list[list]:
    """The documents of each step: the same rows for every row of the table, in the same batches but when packed."""
    from mini_forge.data.batches import plan_epoch, tokenize
    from mini_forge.data.chat import choose_template
    from mini_forge.data.tasks import load_examples
    from mini_forge.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    template = choose_template(None, args.model, tokenizer, "text-generation")
    examples = load_examples(args.data, "text-generation")[: args.steps * BATCH * (2 if is_packed else 1)]
    documents, _ = tokenize(examples, template, tokenizer, MAX_LENGTH)
    plan = plan_epoch([d.inputs for d in documents], BATCH, 1, False, is_packed, MAX_LENGTH, 42, 0)
    return [[documents[i] for i in batch] for batch in plan]


def loss(row: int, model, documents):
    """(summed loss, trained tokens) of the documents, as row `row` computes it."""
    from mini_forge.data.batches import collate
    from mini_forge.training.sft import sft_loss

    if row == 0:
        return padded_loss(model, documents)
    is_shared = row >= LEVERS.index("shared beginnings, last layer where trained")
    batch = collate(documents, share_prefixes=is_shared)
    if row == 1:
        return all_logits_loss(model, batch.input_ids, batch.targets, batch.position, batch.document)
    if row < LEVERS.index("shared beginnings, last layer where trained"):
        return everywhere_loss(model, batch)
    result = sft_loss(model, batch)
    return result.total, result.count


def padded_loss(model, documents):
    """Rows padded on the right to the longest. Padding attends to nothing but itself, and costs as any token does."""
    import torch

    longest = max(d.inputs for d in documents)
    ids, targets = torch.zeros(len(documents), longest, dtype=torch.int64), torch.full((len(documents), longest), -100)
    for i, d in enumerate(documents):
        ids[i, : d.inputs] = torch.from_numpy(d.ids[:-1].astype("int64"))
        targets[i, : d.inputs] = torch.from_numpy(d.ids[1:].astype("int64")).where(
            torch.from_numpy(d.is_trained[1:]), -100
        )
    position = torch.arange(longest).expand(len(documents), -1)
    return all_logits_loss(model, ids, targets, position, torch.zeros_like(ids))


def all_logits_loss(model, ids, targets, position, document):
    """The whole (B, T, V) float32 logits, as the textbook has it."""
    import torch.nn.functional as F

    logits, targets = model.head(model(ids, position, document)), targets.to(model.device)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


def everywhere_loss(model, batch):
    """The chunked head on trained tokens, behind a last layer that computes all."""
    from mini_forge.training.losses import token_nll

    rows, targets, _ = (x.to(model.device) for x in batch.trained())
    hidden = model(batch.input_ids, batch.position, batch.document).flatten(0, 1)
    nll = token_nll(hidden[rows], model.head_weight, targets)
    return nll.sum(), nll.numel()


if __name__ == "__main__":
    main()
