"""Golden files of the reward model, made with transformers and PEFT: tests/golden/reward/expected.json.

python tests/golden/make_reward.py     # beside mini_forge, with tests/golden/requirements-peers.txt installed
"""

import json
import tempfile
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers

HERE = Path(__file__).parent
BASE, INIT_ADAPTER = HERE / "training" / "base", HERE / "training" / "init_adapter"
PAD = 7
TEXTS = [
    [5, 6, 90, 8, 9], [5, 6, 200, 11, PAD, PAD], [40, 41, 42, PAD, 43, 1], [40, 41, 42, 3, 3, 3, 17],
    [100, PAD], [100, 101, 102, 103],
]  # fmt: skip
LEARNING_RATE, MARGIN, CENTERING, STEPS = 5e-3, 0.2, 0.05, 8


def classifier(score, pad_token_id):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=1, pad_token_id=pad_token_id, dtype=torch.float32, attn_implementation="eager"
    )
    model.score.weight.data = score.clone()
    return model.eval()


def score_each(model):
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in TEXTS])


def train(score):
    """The plain loop: every text alone, the mean over pairs, adapter and head trained together."""
    with tempfile.TemporaryDirectory() as folder:
        for file in INIT_ADAPTER.iterdir():
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        record = json.loads((INIT_ADAPTER / "adapter_config.json").read_text())
        (Path(folder) / "adapter_config.json").write_text(json.dumps(record | {"task_type": None}))
        model = peft.PeftModel.from_pretrained(classifier(score, None), folder, is_trainable=True).eval()
    head = model.base_model.model.score
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        chosen, rejected = score_each(model).view(-1, 2).unbind(1)
        loss = -F.logsigmoid(chosen - rejected - MARGIN).mean() + CENTERING * ((chosen + rejected) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    settings = {"learning_rate": LEARNING_RATE, "margin": MARGIN, "centering": CENTERING}
    return {**settings, "losses": losses, "score": head.weight[0].tolist()}


def main():
    width = json.loads((BASE / "config.json").read_text())["hidden_size"]
    score = torch.randn(1, width, generator=torch.Generator().manual_seed(0)) / (width + 1) ** 0.5
    cases = {}
    for name, pad in (("none", None), ("in texts", PAD)):
        with torch.no_grad():
            cases[name] = {"pad_token_id": pad, "scores": score_each(classifier(score, pad)).tolist()}
    record = {"texts": TEXTS, "score": score[0].tolist(), "classifier": cases, "training": train(score)}
    (HERE / "reward").mkdir(exist_ok=True)
    (HERE / "reward" / "expected.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
