"""The model card a run leaves: what was trained, on what, how it went, how to use it."""

import json


def model_card(config: dict, summary: dict, base: str) -> str:
    """README.md of a run, in the hub's format: YAML header, then prose."""
    rows = [
        ("base model", base),
        ("strategy", config["strategy"]),
        ("task", config["task"]),
        ("LoRA", f"rank {config['lora_r']}, alpha {config['lora_alpha']}, dropout {config['lora_dropout']}"),
        ("base stored as", summary["quantization"] or summary["precision"]),
        ("prompt template", summary["template"]),
        ("rows trained on", summary["rows"]),
        ("optimizer steps", summary["steps"]),
        ("learning rate", f"{config['learning_rate']} ({config['lr_scheduler_type']})"),
        ("training loss, first to last logged", _change(summary["train_loss_first"], summary["train_loss_last"])),
        ("held-out loss, before to after", _change(summary["eval_loss_first"], summary["eval_loss_last"])),
        ("tokens per second", summary["tokens_per_second"]),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags: [lora, mini_forge]
---

# Adapter for {base}

A LoRA adapter trained with mini_forge {summary["versions"]["mini_forge"]}.

| | |
|---|---|
{table}

The whole configuration is in `training_config.json`, every logged step in `metrics.jsonl`.

## Use
```bash
python -m mini_forge chat .                 # with the template it was trained with
python -m mini_forge merge . ../merged      # a full model for other programs
```
The adapter is in PEFT's format: `PeftModel.from_pretrained(base, "this folder")`.
"""


def _change(first, last) -> str:
    return "not measured" if first is None else f"{first:.4f} → {last:.4f}"
