"""Golden DPO: six steps of a plain transformers+PEFT loop with each of four preference losses.

    python tests/golden/make_dpo.py        # needs tests/golden/training, as `make_golden.py training` left it

Into golden/dpo: `pairs.jsonl`, `tokens.json` (both sides as the Hugging Face tokenizer sees them), and for each loss
the per-step losses, rewards and gradient norms and the final adapter. Model, tokenizer and initial adapter are those of
golden/training; that adapter's B is random, so policy and reference differ from the first step.

The loop is the textbook one: padded batches, full float32 logits, log-probabilities summed over response tokens, the
reference by `disable_adapter`, the mean over the step's pairs, clipping, AdamW.
"""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from make_training import check_noise, load_base, pad
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer

SETTINGS = {"steps": 6, "learning_rate": 1e-3, "weight_decay": 0.001, "max_grad_norm": 0.3, "beta": 0.1,
            "lr_scheduler_type": "constant"}  # fmt: skip
LOSSES = {  # name -> label_smoothing, and the loss of Δ (for ipo: of the difference of per-token means)
    "sigmoid": (0.0, lambda d, b, e: -F.logsigmoid(b * d)),
    "ipo": (0.0, lambda d, b, e: (d - 1 / (2 * b)).pow(2)),
    "hinge": (0.0, lambda d, b, e: torch.clamp(1 - b * d, min=0)),
    "robust": (0.1, lambda d, b, e: (-(1 - e) * F.logsigmoid(b * d) + e * F.logsigmoid(-b * d)) / (1 - 2 * e)),
}


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# Strings and message lists, one turn and several, responses of 3 to 40 tokens.
ROWS = [
    {"prompt": "What is two and three?", "chosen": "five", "rejected": "Two and three is a question about numbers."},
    {"prompt": [say("system", "You are brief."), say("user", "Who are you?")],
     "chosen": [say("assistant", "A very small model.")],
     "rejected": [say("assistant", "I am the sky, and I like to speak of it at length.\nVery long.")]},
    {"prompt": [say("user", "Is seven prime?"), say("assistant", "Yes."), say("user", "Is eight prime?")],
     "chosen": "No, eight is two times four.", "rejected": "Yes."},
    {"prompt": "Schreibe: grün, weiß, 日本.", "chosen": "grün, weiß, 日本 🙂", "rejected": "gruen, weiss"},
]  # fmt: skip


def main(golden: Path):
    folder, training = golden / "dpo", golden / "training"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(training / "base")
    pairs = [{side: tokenise(tokenizer, row, side) for side in ("chosen", "rejected")} for row in ROWS]
    (folder / "tokens.json").write_text(json.dumps(pairs).replace("}, ", "},\n ") + "\n")
    for name in LOSSES:
        record = run_reference(training, folder, name, pairs)
        print(f"dpo/{name}: loss {record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}")


def tokenise(tokenizer, row: dict, side: str) -> dict:
    """`ids` of the prompt and one side, and `is_trained`: 1 on the response and its end token."""
    prompt, response = (
        [say(role, row[key])] if isinstance(row[key], str) else row[key]
        for role, key in (("user", "prompt"), ("assistant", side))
    )
    text = tokenizer.apply_chat_template(prompt + response, tokenize=False)
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text.startswith(before)
    start, end = len(before), len(text.rstrip("\n"))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return {"ids": encoded["input_ids"], "is_trained": [int(start <= a < end) for a, _ in encoded["offset_mapping"]]}


def run_reference(training: Path, folder: Path, name: str, pairs: list[dict]) -> dict:
    def start():
        return PeftModel.from_pretrained(load_base(training / "base"), training / "init_adapter", is_trainable=True)

    model, other = start().train(), start().train()
    record = train(model, name, [pairs])
    train(other, name, [[pair] for pair in pairs])
    adapter = get_peft_model_state_dict(model)
    check_noise(adapter, get_peft_model_state_dict(other))
    (folder / name).mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in adapter.items()}
    save_file(tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = SETTINGS | {"loss_type": name, "label_smoothing": LOSSES[name][0]}
    (folder / name / "expected.json").write_text(json.dumps({"settings": settings, **record}, indent=1) + "\n")
    return record


def response_logps(model, sides: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of the responses, and how many tokens each is."""
    batch = pad(sides)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    is_response = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (logps * is_response).sum(-1), is_response.sum(-1)


def train(model, name: str, microbatches: list[list[dict]]) -> dict:
    """The reference loop: of each step the mean loss and rewards before its update, and the gradient's norm."""
    epsilon, loss_of = LOSSES[name]
    beta, count = SETTINGS["beta"], sum(len(pairs) for pairs in microbatches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    record = {"losses": [], "rewards_chosen": [], "rewards_rejected": [], "grad_norms": []}
    for _ in range(SETTINGS["steps"]):
        sums = [0.0, 0.0, 0.0]
        for pairs in microbatches:
            ratios = {}
            for side in ("chosen", "rejected"):
                sides = [pair[side] for pair in pairs]
                with torch.no_grad(), model.disable_adapter():
                    reference, _ = response_logps(model, sides)
                logps, tokens = response_logps(model, sides)
                ratios[side] = logps - reference
                ratios[side, "mean"] = ratios[side] / tokens
            how = (lambda side: (side, "mean")) if name == "ipo" else (lambda side: side)
            total = loss_of(ratios[how("chosen")] - ratios[how("rejected")], beta, epsilon).sum()
            (total / count).backward()
            values = (total, beta * ratios["chosen"].sum(), beta * ratios["rejected"].sum())
            sums = [old + value.item() / count for old, value in zip(sums, values, strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["max_grad_norm"]).item()
        for values, value in zip(record.values(), (*sums, norm), strict=True):
            values.append(value)
        optimizer.step()
        optimizer.zero_grad()
    return record


if __name__ == "__main__":
    main(Path(__file__).parent)
