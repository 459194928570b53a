"""Golden KTO: six steps of a plain transformers+PEFT loop on labelled rows, with equal and with unequal weights.

    python tests/golden/make_kto.py        # needs tests/golden/training, as `make_golden.py training` left it

Into golden/kto: `rows.jsonl`, `tokens.json` (the rows as the Hugging Face tokenizer sees them), and for each case the
order of the rows, the per-step losses, rewards, reference points and gradient norms and the final adapter. Model,
tokenizer and initial adapter are those of golden/training; that adapter's B is random, so policy and reference differ
from the first step.

The loop is the textbook one: padded batches, full float32 logits, log-probabilities summed over completion tokens, the
reference by `disable_adapter`, completions moved on by one row within the microbatch for the reference point, the mean
over the step's rows, clipping, AdamW. One step is one epoch: all rows, in a random order of the epoch's own.
"""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from make_dpo import response_logps, say
from make_training import check_noise, load_base
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer

SETTINGS = {"steps": 6, "learning_rate": 1e-3, "weight_decay": 0.001, "max_grad_norm": 0.3, "beta": 0.1,
            "lr_scheduler_type": "constant", "seed": 42}  # fmt: skip
CASES = {  # name -> rows of a microbatch, desirable_weight, undesirable_weight
    "equal": (3, 1.0, 1.0),
    "weighted": (4, 1.5, 0.75),  # 4 + 2 rows: the reference point is a microbatch's own, the mean a step's
}
# Strings and message lists, one turn and several, completions of 1 to 40 tokens.
ROWS = [
    {"prompt": "What is two and three?", "completion": "five", "label": True},
    {"prompt": [say("system", "You are brief."), say("user", "Who are you?")],
     "completion": [say("assistant", "I am the sky, and I like to speak of it at length.\nVery long.")],
     "label": False},
    {"prompt": [say("user", "Is seven prime?"), say("assistant", "Yes."), say("user", "Is eight prime?")],
     "completion": "No, eight is two times four.", "label": True},
    {"prompt": "Schreibe: grün, weiß, 日本.", "completion": "gruen, weiss", "label": False},
    {"prompt": "Name a colour.", "completion": [say("assistant", "Green.")], "label": True},
    {"prompt": "Name two numbers.", "completion": "Seven and eight, and I could name others.", "label": True},
]  # fmt: skip


def main(golden: Path):
    folder, training = golden / "kto", golden / "training"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(training / "base")
    rows = [tokenise(tokenizer, row) for row in ROWS]
    (folder / "tokens.json").write_text(json.dumps(rows).replace("}, ", "},\n ") + "\n")
    for name in CASES:
        record = run_reference(training, folder, name, rows)
        print(f"kto/{name}: loss {record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}, z0 {record['kl']}")


def tokenise(tokenizer, row: dict) -> dict:
    """`ids` of a row up to its end token, `is_trained`: 1 on the completion and its end token, and its `label`."""
    prompt, completion = (
        [say(role, row[key])] if isinstance(row[key], str) else row[key]
        for role, key in (("user", "prompt"), ("assistant", "completion"))
    )
    text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text.startswith(before)
    start, end = len(before), len(text.rstrip("\n"))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    kept = [(i, int(start <= a)) for i, (a, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if a < end]  # fmt: skip
    return {"ids": [i for i, _ in kept], "is_trained": [flag for _, flag in kept], "label": row["label"]}


def orders(count: int) -> list[list[int]]:
    """The rows' order in each step: of an epoch, a permutation drawn from a seed that is made of its number's."""
    made = []
    for epoch in range(SETTINGS["steps"]):
        seed = int(np.random.SeedSequence([SETTINGS["seed"], epoch]).generate_state(1)[0])
        made.append(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())
    return made


def run_reference(training: Path, folder: Path, name: str, rows: list[dict]) -> dict:
    def start():
        return PeftModel.from_pretrained(load_base(training / "base"), training / "init_adapter", is_trainable=True)

    model, other = start().train(), start().train()
    record = train(model, name, rows)
    train(other, name, rows, alone=True)
    adapter = get_peft_model_state_dict(model)
    check_noise(adapter, get_peft_model_state_dict(other))
    (folder / name).mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in adapter.items()}
    save_file(tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    batch, desirable, undesirable = CASES[name]
    weights = {"batch_size": batch, "desirable_weight": desirable, "undesirable_weight": undesirable}
    expected = {"settings": SETTINGS | weights, "orders": orders(len(rows)), **record}
    (folder / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return record


def swapped(rows: list[dict]) -> list[dict]:
    """Each row's prompt with the completion of the next row."""
    made = []
    for i, row in enumerate(rows):
        other = rows[(i + 1) % len(rows)]
        cut, begin = row["is_trained"].index(1), other["is_trained"].index(1)
        flags = row["is_trained"][:cut] + other["is_trained"][begin:]
        made.append({"ids": row["ids"][:cut] + other["ids"][begin:], "is_trained": flags})
    return made


def log_ratios(model, rows: list[dict]) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference, _ = response_logps(model, rows)
    return response_logps(model, rows)[0] - reference


def train(model, name: str, rows: list[dict], alone: bool = False) -> dict:
    """The reference loop: of each step the mean loss before its update, the mean rewards of each label, the mean
    reference point of its rows, and the gradient's norm. `alone`: every document in a pass of its own."""
    size, desirable_weight, undesirable_weight = CASES[name]
    beta, count = SETTINGS["beta"], len(rows)
    good = sum(row["label"] for row in rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    record = {"losses": [], "rewards_desirable": [], "rewards_undesirable": [], "kl": [], "grad_norms": []}
    for order in orders(count):
        sums = [0.0, 0.0, 0.0, 0.0]
        for begin in range(0, count, size):
            batch = [rows[i] for i in order[begin : begin + size]]
            with torch.no_grad():
                z0 = max(0.0, ratios_of(model, swapped(batch), alone).mean().item())
            for part in [[row] for row in batch] if alone else [batch]:
                ratios = log_ratios(model, part)
                is_good = torch.tensor([row["label"] for row in part])
                value = torch.where(is_good, ratios - z0, z0 - ratios)
                weight = torch.where(is_good, desirable_weight, undesirable_weight)
                total = (weight * (1 - torch.sigmoid(beta * value))).sum()
                (total / count).backward()
                rewards = beta * ratios.detach()
                values = (total.item() / count, rewards[is_good].sum().item() / good,
                          rewards[~is_good].sum().item() / (count - good), z0 * len(part) / count)  # fmt: skip
                sums = [old + new for old, new in zip(sums, values, strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["max_grad_norm"]).item()
        for values, value in zip(record.values(), (*sums, norm), strict=True):
            values.append(value)
        optimizer.step()
        optimizer.zero_grad()
    return record


def ratios_of(model, rows: list[dict], alone: bool) -> torch.Tensor:
    return torch.cat([log_ratios(model, [row]) for row in rows]) if alone else log_ratios(model, rows)


if __name__ == "__main__":
    main(Path(__file__).parent)
