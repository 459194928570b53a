"""The plain transformers+PEFT loop that quality.py holds ours against; it also judges both adapters.

    python tests/bench/peer_loop.py init  --model FOLDER --adapter OUT
    python tests/bench/peer_loop.py train --model FOLDER --adapter INIT --data ROWS --out OUT --rows-per-step 10
    python tests/bench/peer_loop.py eval  --model FOLDER --data ROWS [--adapter FOLDER]

float32, one row at a time, summed loss over the trained-on tokens of a step divided by their number, AdamW, cosine.
Prints one JSON line: {"losses": […]} or {"loss": …}.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_common import LORA, MAX_LENGTH, OPTIMIZATION, TARGETS, WARMUP_RATIO, read_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

sys.path.append(str(Path(__file__).parents[1] / "golden"))
from make_training import tokenise  # noqa: E402


def main():
    args = parse()
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    if args.action == "init":
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **LORA)
        get_peft_model(model, lora).save_pretrained(args.adapter)
        result = {"adapter": args.adapter}
    elif args.action == "train":
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
        result = {"losses": train(model, load_rows(args), args.rows_per_step)}
        model.save_pretrained(args.out)
    else:
        model = PeftModel.from_pretrained(model, args.adapter) if args.adapter else model
        result = {"loss": evaluate(model, load_rows(args))}
    print(json.dumps(result))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("init", "train", "eval"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--data")
    parser.add_argument("--out")
    parser.add_argument("--rows-per-step", type=int, default=10)
    return parser.parse_args()


def load_rows(args) -> list[dict]:
    """Rows as token `ids` and `is_trained`."""
    chats = [{"messages": [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]}
             for row in read_rows(args.data)]  # fmt: skip
    rows = tokenise(AutoTokenizer.from_pretrained(args.model), chats)
    longest = max(len(row["ids"]) for row in rows)
    if longest > MAX_LENGTH:
        sys.exit(f"{args.data}: a row of {longest} tokens; choose rows of up to {MAX_LENGTH}, which need no truncation")
    return rows


def summed_loss(model, row: dict) -> torch.Tensor:
    input_ids, is_trained = torch.tensor(row["ids"]), torch.tensor(row["is_trained"]).bool()
    labels = torch.where(is_trained, input_ids, -100)[1:]
    return F.cross_entropy(model(input_ids[None]).logits[0, :-1].float(), labels, ignore_index=-100, reduction="sum")


def count(rows: list[dict]) -> int:
    return sum(sum(row["is_trained"][1:]) for row in rows)


def train(model, rows: list[dict], rows_per_step: int) -> list[float]:
    """One epoch in the order given. Returns each step's loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, OPTIMIZATION["learning_rate"], weight_decay=OPTIMIZATION["weight_decay"])
    steps = math.ceil(len(rows) / rows_per_step)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * WARMUP_RATIO), steps)
    losses = []
    for begin in range(0, len(rows), rows_per_step):
        chosen = rows[begin : begin + rows_per_step]
        total = 0.0
        for row in chosen:
            loss = summed_loss(model, row) / count(chosen)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZATION["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {len(losses)}/{steps}: {total:.4f}", file=sys.stderr, flush=True)
    return losses


@torch.no_grad()
def evaluate(model, rows: list[dict]) -> float:
    model.eval()
    return sum(summed_loss(model, row).item() for row in rows) / count(rows)


if __name__ == "__main__":
    main()
