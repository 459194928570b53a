"""What a reward model and DPO learn from real pairs: accuracy on held-out ones before and after, with its error.

    python tests/bench/preferences_study.py --model FOLDER --data gsm8k_pairs.jsonl [--part reward|dpo]
                                            [--learning-rates 1e-4 3e-4] [--train 160] [--out results.jsonl]

One run of `mini_forge.train` for each learning rate, evaluated on the held-out pairs before the first step and after
the last. The rate is chosen by its loss on validation pairs, which are neither trained on nor reported; the other
rates are shown all the same. The three sets are drawn by the seed from the pairs that fit into --max-length.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench_common import LORA, read_rows

import mini_forge
from mini_forge.data.chat import choose_template
from mini_forge.data.pairs import PairDocument, tokenize_pairs
from mini_forge.data.tasks import load_examples
from mini_forge.inference.evaluate import evaluate_pairs
from mini_forge.io.rewards import load_reward
from mini_forge.settings import objective_of
from mini_forge.training.adapters_swap import swapped
from mini_forge.training.reward import RewardHead, reward_objective

RATES = {"reward": [1e-4, 3e-4], "dpo": [5e-5, 2e-4]}
SHOWN = {"reward": ["reward_accuracy"], "dpo": ["reward_accuracy", "logps_accuracy"]}  # fractions of the pairs
SETS = ("held_out", "validation", "train")
EVAL_BATCH = 4


class RewardTrained(Exception):
    """The reward model is saved; the PPO that an rlhf run goes on with is not wanted here."""


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes, longer = write_sets(args, folder)
        print(f"{time.strftime('%Y-%m-%d')} pairs of up to {args.max_length} tokens a side: {sizes}; of the held-out, "
              f"{longer:.1%} have the longer response chosen")  # fmt: skip
        for part in [args.part] if args.part else RATES:
            records = []
            for rate in args.learning_rates or RATES[part]:
                records.append({"sizes": sizes, "longer": longer, **study(args, folder, part, rate)})
                if args.out:
                    with open(args.out, "a", encoding="utf-8") as out:
                        out.write(json.dumps(records[-1]) + "\n")
            show(part, records, sizes["held_out"])


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL rows with `prompt`, `chosen`, `rejected`")
    parser.add_argument("--part", choices=tuple(RATES), help="left out: both")
    parser.add_argument("--learning-rates", type=float, nargs="+")
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--validation", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", help="append a record of every run to this JSONL file")
    return parser.parse_args()


def write_sets(args, folder: Path) -> tuple[dict[str, int], float]:
    """Files of held-out, validation and training pairs; their sizes, and how often the held-out's chosen is longer."""
    rows, documents = read_rows(args.data), tokenized(args.model, args.data, None)
    if len(rows) != len(documents):
        sys.exit(f"{args.data}: {len(rows) - len(documents)} rows have an empty response")
    fitting = [i for i, d in enumerate(documents) if max(len(side.ids) for side in d.sides) <= args.max_length]
    random.Random(args.seed).shuffle(fitting)
    sizes, start = dict(zip(SETS, (args.held_out, args.validation, args.train), strict=True)), 0
    if sum(sizes.values()) > len(fitting):
        sys.exit(f"{args.data}: {len(fitting)} pairs of up to {args.max_length} tokens; {sizes} asked for")
    for name, size in sizes.items():
        lines = [json.dumps(rows[i]) + "\n" for i in fitting[start : start + size]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        start += size
    held_out = [documents[i] for i in fitting[: args.held_out]]
    return sizes, sum(len(d.chosen.ids) > len(d.rejected.ids) for d in held_out) / len(held_out)


def tokenized(model: str, data: str | Path, max_length: int | None) -> list[PairDocument]:
    tokenizer = mini_forge.load_tokenizer(model)
    template = choose_template(None, model, tokenizer, "text-generation")
    return tokenize_pairs(load_examples(str(data), "text-generation", "dpo"), template, tokenizer, max_length)[0]


def settings(args, folder: Path, part: str, rate: float) -> dict:
    own = {"strategy": "rlhf", "reward_learning_rate": rate, "reward_epochs": args.epochs}
    if part == "dpo":
        own = {"strategy": "dpo", "learning_rate": rate, "num_train_epochs": args.epochs, "precompute_reference": True}
    return {
        "task": "text-generation", "model_name": args.model, "dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "held_out.jsonl"), "output_dir": str(folder / f"{part}_{rate}"),
        "compute_specs": "high_end", "provider": "unsloth", "device": "cpu", "dtype": "float32", "use_4bit": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": EVAL_BATCH, "max_seq_length": args.max_length, "group_by_length": False,
        "optim": "adamw_torch", "max_grad_norm": 1.0, "eval_steps": 10**6, "logging_steps": 5, "save_strategy": "no",
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": 0.0, "seed": args.seed, **own,
    }  # fmt: skip


def study(args, folder: Path, part: str, rate: float) -> dict:
    """One run: the held-out metrics of its beginning and end, its loss on the validation pairs, its training curve."""
    config = mini_forge.TrainingConfig.from_dict(settings(args, folder, part, rate))
    records, began = [], time.perf_counter()
    tell = partial(print, file=sys.stderr, flush=True)

    def on_metrics(record: dict):
        records.append(record)
        told = {name: round(value, 4) for name, value in record.items() if "reward" in name or name.endswith("loss")}
        tell(f"{part} {rate:g} step {record['step']}: {told}")

    def on_step(step: int, total: int):
        if part == "reward":  # this counts the updates of PPO, and comes before the first
            raise RewardTrained

    try:
        mini_forge.train(config, report=tell, on_metrics=on_metrics, on_step=on_step)
    except RewardTrained:
        tell("reward model trained; no PPO")
    seconds = time.perf_counter() - began
    evaluations = [{k.removeprefix("eval_"): v for k, v in r.items()} for r in records if "eval_loss" in r]
    validation = judge(config, tokenized(args.model, folder / "validation.jsonl", args.max_length))
    return {
        "part": part, "learning_rate": rate, "epochs": args.epochs, "seed": args.seed, "seconds": round(seconds, 1),
        "validation": validation, "before": evaluations[0], "after": evaluations[-1],
        "training": [r for r in records if "loss" in r],
    }  # fmt: skip


def judge(config: mini_forge.TrainingConfig, documents: list[PairDocument]) -> dict:
    """What the finished run says of other pairs."""
    if config.strategy == "dpo":
        model = mini_forge.load_model(config.output_dir)
        return evaluate_pairs(model, documents, objective_of(config).sums, batch_size=EVAL_BATCH)
    stored = load_reward(f"{config.output_dir}/reward", mini_forge.load_model(config.model_name), config.model_name)
    sums = reward_objective(RewardHead.of(stored.score, stored.pad_id)).sums
    with swapped(stored.model, stored.factors):
        return evaluate_pairs(stored.model, documents, sums, batch_size=EVAL_BATCH)


def show(part: str, records: list[dict], pairs: int):
    """The held-out pairs before and after each run, the chosen one marked. ±: one binomial standard error."""
    best = min(records, key=lambda record: record["validation"]["eval_loss"])
    print(f"\n{part} on {pairs} held-out pairs; *: the rate with the lowest loss on validation pairs")
    for record in records:
        before, after = record["before"], record["after"]
        accuracies = [f"{name} {share(before[name], pairs)} -> {share(after[name], pairs)}" for name in SHOWN[part]]
        print(f"{'*' if record is best else ' '} {record['learning_rate']:g}: {', '.join(accuracies)}, margin "
              f"{before['reward_margin']:+.3f} -> {after['reward_margin']:+.3f}, loss {before['loss']:.4f} -> "
              f"{after['loss']:.4f}, validation loss {record['validation']['eval_loss']:.4f}; "
              f"{record['seconds']:.0f} s")  # fmt: skip


def share(p: float, n: int) -> str:
    return f"{p:.1%} ± {math.sqrt(p * (1 - p) / n):.1%}"


if __name__ == "__main__":
    main()
