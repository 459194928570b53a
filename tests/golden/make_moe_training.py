"""Golden training of experts: ten steps of the plain transformers+PEFT loop on a tiny Qwen3-MoE, gpt-oss and Llama 4.

Into golden/moe_training/FAMILY: `base` (without a tokenizer: it is that of golden/training), and for the targets
"attention" (q, k, v, o) and "experts" (q, v and both stacks through `target_parameters`) a folder with `init_adapter`
(A and B both random), the per-step losses and gradient norms, and the final adapter. Loop, settings and rows are those
of make_training.py, but for the rank and the rows: the first four, as one padded batch.
"""

import json
import shutil
from pathlib import Path

import make_moe_families as moe
import torch
from make_families import make_config, randomise
from make_training import SETTINGS, check_noise, pad, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROWS = 4
SHARED = {"vocab_size": 320, "intermediate_size": 16, "tie_word_embeddings": True, "pad_token_id": 2, "head_dim": 8}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
                  "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {**moe.GPT_OSS_YARN, "rope_theta": 500.0}},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24,
                    "interleave_moe_layer_step": 1, "no_rope_layers": [1, 0], "attention_chunk_size": 16,
                    "floor_scale": 8, "attn_scale": 0.5},
}  # fmt: skip
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
SEED = 5
CHOICE_MARGIN = 1e-5  # of router logits, ten times what float32 sums in another order move them


def targets(kind: str) -> dict[str, dict]:
    owner = "feed_forward" if kind.startswith("llama4") else "mlp"
    parameters = [f"{owner}.experts.gate_up_proj", f"{owner}.experts.down_proj"]
    return {
        "attention": {"target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"]},
        "experts": {"target_modules": ["q_proj", "v_proj"], "target_parameters": parameters},
    }


def main(golden: Path):
    rows = json.loads((golden / "training" / "tokens.json").read_text())[:ROWS]
    for kind, options in FAMILIES.items():
        folder = golden / "moe_training" / kind
        shutil.rmtree(folder, ignore_errors=True)
        make_base(folder / "base", kind, options)
        for name, chosen in targets(kind).items():
            make_adapter(folder, name, chosen)
            losses = run_reference(folder, name, rows)
            print(f"moe_training/{kind}/{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def make_base(folder: Path, kind: str, options: dict):
    model = AutoModelForCausalLM.from_config(make_config(kind, {**SHARED, **options}))
    randomise(model, SEED, gain=1.0)
    model.model.embed_tokens.weight.data *= 0.15  # which is the head too: the loss starts near that of no knowledge
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def load_base(folder: Path):
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain)


def make_adapter(folder: Path, name: str, chosen: dict):
    """PEFT's own files, less the model card, this machine's path and a set's order; B random (std 0.05) like A."""
    torch.manual_seed(SEED)
    model = get_peft_model(load_base(folder / "base"), LoraConfig(**LORA, **chosen))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.05)
    target = folder / name / "init_adapter"
    model.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    path = target / "adapter_config.json"
    record = json.loads(path.read_text()) | {"base_model_name_or_path": "base"} | chosen
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def run_reference(folder: Path, name: str, rows: list[dict]) -> list[float]:
    """Train, save what happened, return the losses."""

    def start():
        model = load_base(folder / "base")
        return PeftModel.from_pretrained(model, folder / name / "init_adapter", is_trainable=True).train()

    model, other = start(), start()
    with moe.recorded_routers(model) as routers:
        losses, norms = train(model, [pad(rows)])
    check_choices(f"{folder.name}/{name}", routers, pad(rows)["attention_mask"].flatten().bool())
    train(other, [pad([row]) for row in rows])
    final = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(model).items()}
    check_noise(final, get_peft_model_state_dict(other))
    save_file(final, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    record = {"settings": SETTINGS | {"lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"]}, "losses": losses,
              "grad_norms": norms}  # fmt: skip
    (folder / name / "expected.json").write_text(json.dumps(record, indent=1) + "\n")
    return losses


def check_choices(name: str, routers: list[tuple[torch.Tensor, int]], is_token: torch.Tensor):
    """In no step may a token's last chosen expert be nearly a draw: a choice that flips changes the loss by 1e-3."""
    gaps = []
    for logits, k in routers:
        ordered = logits.detach().reshape(len(is_token), -1)[is_token].sort(dim=-1, descending=True).values
        gaps.append(float((ordered[:, k - 1] - ordered[:, k]).min()))
    assert min(gaps) > CHOICE_MARGIN, f"{name}: the choice of experts hangs on {min(gaps):.1e}: choose another SEED"
