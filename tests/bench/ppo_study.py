"""PPO on a real model: whether a programmable reward rises, and what memory that takes beside SFT on the same tokens.

    python tests/bench/ppo_study.py --model FOLDER --data gsm8k_pairs.jsonl [--updates 12] [--out results.jsonl]

Three processes, one after another, each one run of `mini_forge.train`:

    ppo     the reward is a function, `ppo_rewards.the_words`: how often a response says "the"
    stages  a reward model trained from pairs, then PPO against it: policy, reward and value on one backbone
    sft     fine-tuning on the prompts and responses that ppo sampled, in batches as large

Peak memory is the process's resident set. Between two updates of PPO every tensor in the process is looked at: how many
bytes are the frozen model's, and whether anything else holds the same values. Exits 1 where the reward does not rise, a
KL is not finite or negative on average, or there is a second backbone. Linux only: it reads /proc.
"""

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import LORA, read_rows
from loading import memory

PROMPTS, HELD_OUT = 64, 32
PAIRS = 16  # for the reward model of `stages`, of which memory is asked, not quality
ROLLOUTS, MICRO_BATCH, NEW_TOKENS = 16, 4, 32
SHOWN = ("reward_mean", "kl", "entropy", "clip_fraction", "approx_kl", "response_tokens", "logp_gap", "value_loss")
MIB = 2**20


def main():
    args = parse()
    if args.side:
        print(json.dumps({"ppo": ppo, "stages": stages, "sft": sft}[args.side](args)))
        return
    from compare import cpu_name

    print(f"{time.strftime('%Y-%m-%d')} {cpu_name()}, {os.cpu_count()} cores; {args.updates} updates of {ROLLOUTS} "
          f"responses of up to {NEW_TOKENS} tokens")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_rows(args, Path(folder))
        runs = {}
        for side in ("ppo", "stages", "sft"):
            runs[side] = measure(args, side, folder)
            if side == "ppo":
                show_learning(runs[side])
            if args.out:
                with open(args.out, "a", encoding="utf-8") as out:
                    out.write(json.dumps({"side": side, **runs[side]}) + "\n")
    show_memory(runs)
    sys.exit(not is_sound(runs))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL rows with `prompt`, `chosen`, `rejected`")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", help="append a record of every process to this JSONL file")
    parser.add_argument("--side", choices=("ppo", "stages", "sft"), help="one process (used within)")
    parser.add_argument("--folder", help="its rows and runs (used within)")
    return parser.parse_args()


def write_rows(args, folder: Path):
    """The shortest prompts, so that little time goes into reading them; which are held out is drawn by the seed."""
    rows = sorted(read_rows(args.data), key=lambda row: len(row["prompt"]))[: PROMPTS + HELD_OUT]
    if len(rows) < PROMPTS + HELD_OUT:
        sys.exit(f"{args.data}: {len(rows)} rows; {PROMPTS + HELD_OUT} are needed")
    random.Random(args.seed).shuffle(rows)
    write(folder / "held_out.jsonl", [{"prompt": row["prompt"]} for row in rows[:HELD_OUT]])
    write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[HELD_OUT:]])
    write(folder / "pairs.jsonl", rows[HELD_OUT : HELD_OUT + PAIRS])


def write(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(args, side: str, folder: str) -> dict:
    given = ["--updates", str(args.updates), "--learning-rate", str(args.learning_rate), "--kl-coef", str(args.kl_coef),
             "--seed", str(args.seed), "--model", args.model, "--data", args.data]  # fmt: skip
    command = [sys.executable, __file__, "--side", side, "--folder", folder, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # its lines for a person go to stderr
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def settings(args, side: str, **own) -> dict:
    return {
        "task": "text-generation", "model_name": args.model, "output_dir": f"{args.folder}/{side}",
        "compute_specs": "high_end", "provider": "unsloth", "device": "cpu", "dtype": "float32", "use_4bit": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": MICRO_BATCH,
        "per_device_eval_batch_size": ROLLOUTS, "gradient_accumulation_steps": 2, "group_by_length": False,
        "max_seq_length": 256, "optim": "adamw_torch", "max_grad_norm": 1.0, "learning_rate": args.learning_rate,
        "warmup_ratio": 0.0, "eval_split": 0, "eval_steps": 10**6, "logging_steps": 1, "save_strategy": "no",
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": 0.0, "seed": args.seed, **own,
    }  # fmt: skip


def reinforcement(args, side: str, **own) -> dict:
    return settings(
        args, side, strategy="rlhf", rollout_batch_size=ROLLOUTS, ppo_epochs=4, num_mini_batches=2,
        kl_coef=args.kl_coef, max_new_tokens=NEW_TOKENS, temperature=1.0, **own,
    )  # fmt: skip


def train(document: dict) -> dict:
    """One run: its metrics, peak memory, seconds and, of PPO, the last look at the process's tensors."""
    import mini_forge

    result = {"metrics": [], "census": None, "reward_stage_peak": None}

    def on_metrics(record: dict):
        result["metrics"].append(record)
        told = {name: round(value, 4) for name, value in record.items() if name in SHOWN or "eval" in name}
        print(f"{record.get('stage', '')} step {record['step']}: {told}", file=sys.stderr, flush=True)
        if "reward_mean" in record:
            result["census"] = census(document["model_name"])

    def on_step(step: int, total: int):
        if step == 0:
            result["reward_stage_peak"] = memory("VmHWM")  # with a function as reward: of loading the model

    config = mini_forge.TrainingConfig.from_dict(document)
    began = time.perf_counter()
    mini_forge.train(config, report=lambda line: print(line, file=sys.stderr), on_metrics=on_metrics, on_step=on_step)
    return {**result, "peak": memory("VmHWM"), "seconds": round(time.perf_counter() - began, 1)}


def ppo(args) -> dict:
    from ppo_rewards import SEEN

    folder = Path(args.folder)
    record = train(reinforcement(
        args, "ppo", dataset=str(folder / "prompts.jsonl"), eval_dataset=str(folder / "held_out.jsonl"),
        reward_function="ppo_rewards:the_words_seen", max_steps=args.updates,
    ))  # fmt: skip
    prompts = {row["prompt"] for row in read_rows(folder / "prompts.jsonl")}
    write(folder / "sampled.jsonl", [row for row in SEEN if row["prompt"] in prompts and row["completion"].strip()])
    samples = read_rows(folder / "ppo" / "samples.jsonl")
    return {**record, "samples": samples[:2] + samples[-2:], "settings": vars(args)}


def stages(args) -> dict:
    pairs = str(Path(args.folder) / "pairs.jsonl")
    return train(reinforcement(args, "stages", dataset=pairs, max_steps=2, reward_epochs=1))


def sft(args) -> dict:
    rows = str(Path(args.folder) / "sampled.jsonl")
    return train(settings(args, "sft", strategy="sft", dataset=rows, num_train_epochs=1))


def census(model_name: str) -> dict:
    """What the tensors alive in this process are: bytes of distinct storages, and copies of the backbone's matrices."""
    import torch

    from mini_forge.io.records import read_spec
    from mini_forge.model.decoder import Decoder

    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    alive += [tensor.grad for tensor in alive if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in alive if tensor.device.type == "cpu"}
    decoders = [thing for thing in gc.get_objects() if issubclass(type(thing), Decoder)]
    frozen = [p for decoder in decoders for p in decoder.parameters() if not p.requires_grad]
    # matrices that stay as stored are buffers
    frozen += [x for decoder in decoders for name, x in decoder.named_buffers() if name.endswith(".weight")]
    backbone = {p.untyped_storage().data_ptr(): p for p in frozen}
    others = {address: tensor for address, tensor in storages.items() if address not in backbone}
    copies = sum(is_copy(other, p) for p in backbone.values() if p.dim() > 1 for other in others.values())
    with torch.device("meta"):
        expected = Decoder(read_spec(Path(model_name)))
    return {
        "decoders": len(decoders), "backbone": total(backbone.values()), "copies": copies,
        "numbers": sum(p.numel() for p in backbone.values()),
        "expected": sum(p.numel() for p in expected.parameters()), "others": total(others.values()),
        "largest_other": max((tensor.untyped_storage().nbytes() for tensor in others.values()), default=0),
    }  # fmt: skip


def total(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def is_copy(other, parameter) -> bool:
    """Whether the storage of `other` holds the parameter's values, in whatever precision."""
    import torch

    if other.untyped_storage().nbytes() != other.itemsize * parameter.numel():
        return False
    values = torch.empty(0, dtype=other.dtype).set_(other.untyped_storage())
    return torch.equal(values.float(), parameter.detach().flatten().to(values.dtype).float())


def evaluations(run: dict) -> list[dict]:
    return [record for record in run["metrics"] if "eval_reward_mean" in record]


def updates(run: dict) -> list[dict]:
    return [record for record in run["metrics"] if "reward_mean" in record]


def show_learning(run: dict):
    print(f"\nupdate {' '.join(f'{name:>15}' for name in SHOWN)}")
    for record in updates(run):
        print(f"{record['step']:6} {' '.join(f'{record[name]:15.4g}' for name in SHOWN)}")
    before, after = evaluations(run)[0], evaluations(run)[-1]
    kl = [record["kl"] for record in updates(run)]
    print(f"KL: mean {sum(kl) / len(kl):.3f}, from {min(kl):.3f} to {max(kl):.3f} nats a response")
    print(f"held-out prompts ({before['eval_rows']}): reward {before['eval_reward_mean']:.3f} -> "
          f"{after['eval_reward_mean']:.3f}, KL {before['eval_kl']:.3f} -> {after['eval_kl']:.3f}; "
          f"{run['seconds']:.0f} s in all")  # fmt: skip
    for sample in run["samples"]:
        print(f"update {sample['step']}, reward {sample['reward']:g}, KL {sample['kl']:.2f}: {sample['response']!r}")


def show_memory(runs: dict[str, dict]):
    print()
    for side, run in runs.items():
        print(f"{side:6} peak {run['peak'] / MIB:6.0f} MiB, {run['peak'] / runs['sft']['peak']:.3f} of sft's")
        if side == "stages":
            print(f"       of which reached by the reward stage: {run['reward_stage_peak'] / MIB:.0f} MiB")
        if counts := run["census"]:
            mib = {name: f"{counts[name] / MIB:.1f} MiB" for name in ("backbone", "others", "largest_other")}
            print(f"       {counts['decoders']} decoder; {counts['numbers']:,} frozen numbers (the model has "
                  f"{counts['expected']:,}) in {mib['backbone']}, copies of a matrix: {counts['copies']}; all other "
                  f"tensors {mib['others']}, the largest {mib['largest_other']}")  # fmt: skip


def is_sound(runs: dict[str, dict]) -> bool:
    rewards = [record["eval_reward_mean"] for record in evaluations(runs["ppo"])]
    kl = [record["kl"] for run in (runs["ppo"], runs["stages"]) for record in updates(run)]
    counts = [run["census"] for run in (runs["ppo"], runs["stages"])]
    is_one = all(c["decoders"] == 1 and c["numbers"] == c["expected"] and not c["copies"] for c in counts)
    return rewards[-1] > rewards[0] and all(map(math.isfinite, kl)) and sum(kl) >= 0 and is_one


if __name__ == "__main__":
    main()
