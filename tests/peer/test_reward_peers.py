"""The reward model live against transformers and PEFT; skipped where they are not installed."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: see tests/peer")
peft = pytest.importorskip("peft", reason="peft is not installed: see tests/peer")

from safetensors.torch import load_file  # noqa: E402

from mini_forge.io.rewards import load_reward, save_reward  # noqa: E402
from mini_forge.io.weights import load_base  # noqa: E402
from mini_forge.model.lora import LoraSpec, inject, lora_layers  # noqa: E402
from mini_forge.training.adapters_swap import put_factors  # noqa: E402
from mini_forge.training.reward import RewardHead, model_scorer  # noqa: E402
from tests import golden_files as golden  # noqa: E402
from tests import tiny_experts  # noqa: E402
from tests.test_reward import rollout  # noqa: E402

TEXTS = [[5, 6, 90, 8, 9], [40, 41, 42, 43, 1], [100, 101, 102, 103, 7, 200]]
LINEARS = ("q_proj", "down_proj")
STACKS = ("q_proj", "experts.gate_up_proj", "experts.down_proj")


def ours(model, head, factors=None):
    return model_scorer(model, factors, head)([rollout(ids[:2], ids[2:]) for ids in TEXTS])


@torch.no_grad()
def theirs(model):
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in TEXTS])


def classifier(base, **options):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=None, dtype=torch.float32, attn_implementation="eager", **options
    )


@pytest.mark.parametrize(("kind", "targets", "rslora"), [
    ("llama", LINEARS, False), ("llama", LINEARS, True), ("llama", None, False), ("qwen3_moe", STACKS, False),
    ("gpt_oss", STACKS, False),
])  # fmt: skip
def test_a_saved_reward_model_loads_in_peft_whole_and_with_the_same_scores(tmp_path, kind, targets, rslora):
    base = golden.BASE if kind == "llama" else tiny_experts.write_checkpoint(tmp_path / "base", kind)
    spec, generator = LoraSpec(4, 8.0, 0.0, targets, rslora), torch.Generator().manual_seed(0)
    model = load_base(base)
    head = RewardHead(model.spec.hidden_size, generator)
    inject(model, spec, generator)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.2, generator=generator)
    (tmp_path / "reward").mkdir()
    save_reward(tmp_path / "reward", model, head, spec, str(base))
    wrapped = peft.PeftModel.from_pretrained(classifier(base), tmp_path / "reward").eval()
    stored = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    assert set(peft.utils.get_peft_model_state_dict(wrapped)) == set(stored)
    expected = ours(model, head)
    assert torch.allclose(theirs(wrapped), expected, atol=1e-4)
    with wrapped.disable_adapter():
        assert (theirs(wrapped) - expected).abs().min() > 1e-3  # the adapter does something


def test_a_reward_adapter_that_peft_saved_loads_here(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"],
                             init_lora_weights=False, lora_dropout=0.1)  # fmt: skip
    wrapped = peft.get_peft_model(classifier(golden.BASE), config).eval()
    wrapped.save_pretrained(tmp_path / "reward")
    model = load_base(golden.BASE)
    inject(model, LoraSpec(8, 8.0))
    stored = load_reward(tmp_path / "reward", model, str(golden.BASE))
    assert stored.model is model
    assert torch.allclose(ours(model, RewardHead.of(stored.score), stored.factors), theirs(wrapped), atol=1e-4)
    put_factors(model, stored.factors)
    assert torch.allclose(ours(model, RewardHead.of(stored.score)), theirs(wrapped), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_sequence_classifier_that_transformers_saved_loads_here(tmp_path, kind):
    base = golden.BASE if kind == "llama" else tiny_experts.write_checkpoint(tmp_path / "base", kind)
    their_model = classifier(base).eval()
    their_model.save_pretrained(tmp_path / "rm")
    stored = load_reward(tmp_path / "rm", load_base(base), str(base))
    assert torch.allclose(
        ours(stored.model, RewardHead.of(stored.score, stored.pad_id)), theirs(their_model), atol=1e-4
    )
