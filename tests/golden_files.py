"""Where the golden files are and how to read them; `tests/golden/make_golden.py` made them from the peers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(folder.name for folder in (GOLDEN / "families").iterdir())
TRAINING = GOLDEN / "training"
BASE = TRAINING / "base"
INIT_ADAPTER = TRAINING / "init_adapter"
DATASET = TRAINING / "rows.jsonl"
MOE_TRAINING = GOLDEN / "moe_training"
MOE_KINDS = ("qwen3_moe", "gpt_oss", "llama4_text")
MOE_ROWS = 4
STORAGES = ("dense", "nf4", "nf4_nested")


def family(name: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The checkpoint's folder, input_ids (2, 24) int64, and transformers' logits (2, 24, V) float32."""
    folder = GOLDEN / "families" / name
    expected = load_file(folder / "expected.safetensors")
    return folder, expected["input_ids"], expected["logits"]


def tokenised_rows() -> list[tuple[list[int], list[bool]]]:
    """Each row of DATASET as the Hugging Face tokenizer sees it: token ids, and which of them are trained on."""
    rows = json.loads((TRAINING / "tokens.json").read_text())
    return [(row["ids"], [bool(flag) for flag in row["is_trained"]]) for row in rows]


@dataclass(frozen=True)
class Reference:
    """Ten optimizer steps of the plain transformers+PEFT loop."""

    losses: list[float]
    grad_norms: list[float]
    adapter: dict[str, torch.Tensor]
    settings: dict


def reference(storage: str) -> Reference:
    """storage: one of STORAGES."""
    record = json.loads((TRAINING / storage / "expected.json").read_text())
    adapter = load_file(TRAINING / storage / "adapter_model.safetensors")
    return Reference(record["losses"], record["grad_norms"], adapter, record["settings"])


def moe_case(kind: str, targets: str) -> tuple[Path, Path, Reference]:
    """The base's folder (without tokenizer), the initial adapter's, and ten steps of the plain loop on the first
    MOE_ROWS rows of DATASET. kind: one of MOE_KINDS; targets: "attention" or "experts"."""
    folder = MOE_TRAINING / kind / targets
    record = json.loads((folder / "expected.json").read_text())
    adapter = load_file(folder / "adapter_model.safetensors")
    expected = Reference(record["losses"], record["grad_norms"], adapter, record["settings"])
    return MOE_TRAINING / kind / "base", folder / "init_adapter", expected


def rslora_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (1, T) int64 and the logits (1, T, V) of BASE with INIT_ADAPTER under `use_rslora`."""
    expected = load_file(TRAINING / "rslora_expected.safetensors")
    return expected["input_ids"], expected["logits"]


def initial_adapter() -> dict[str, torch.Tensor]:
    return load_file(INIT_ADAPTER / "adapter_model.safetensors")


def chat_renderings() -> dict:
    """chat.json: `conversations` {title: messages}; `templates` [{name, template, bos_token, eos_token, rendered}]."""
    return json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))
