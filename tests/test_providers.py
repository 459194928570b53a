"""What a provider gives to the layers that make their own products, and what a run imports for it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec
from mini_forge.model.lora import LoraSpec, LoRAStack, inject, lora_layers
from mini_forge.providers import PROVIDERS, token_nll
from mini_forge.training import losses
from mini_forge_kernels import linear_cross_entropy
from tests.tiny import write_rows
from tests.tiny_experts import CONFIGS, SHARED

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys
import mini_forge
mini_forge.train(mini_forge.TrainingConfig.from_dict(json.loads(sys.argv[1])))
print("imported:", *[name for name in ("triton", "bitsandbytes", "sympy", "torch._dynamo") if name in sys.modules])
"""


def model_with_experts(provider):
    model = Decoder(decoder_spec({**SHARED, **CONFIGS["gpt_oss"]}), provider.ops)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    inject(model, LoraSpec(2, 4, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj")), generator)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(generator=generator)
    return model.train()


def test_experts_of_a_fused_model_equal_the_plain_ones():
    results = []
    for name in ("huggingface", "unsloth"):
        model = model_with_experts(PROVIDERS[name]("cpu"))
        stacks = [layer for _, layer in lora_layers(model) if isinstance(layer, LoRAStack)]
        assert stacks and all((layer.update is None) == (name == "huggingface") for layer in stacks)
        hidden = model(torch.arange(20)[None])
        hidden.square().sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * a.abs().max().item())


@pytest.mark.parametrize("name", ["huggingface", "unsloth"])
def test_the_loss_is_of_the_head_and_by_the_ops(name, monkeypatch):
    model, calls = model_with_experts(PROVIDERS[name]("cpu")), []
    plain = losses.token_nll
    monkeypatch.setattr(losses, "token_nll", lambda *arguments: calls.append("plain") or plain(*arguments))
    if model.ops.token_nll:
        fused = model.ops.token_nll
        model.ops = replace(model.ops, token_nll=lambda *arguments: calls.append("fused") or fused(*arguments))
    hidden, targets = model(torch.arange(9)[None])[0], torch.arange(9)
    chances = model.head(hidden).log_softmax(-1)
    torch.testing.assert_close(losses.model_nll(model, hidden, targets), -chances[targets, targets])
    assert calls[0] == ("plain" if name == "huggingface" else "fused")


@pytest.mark.parametrize("reason, chosen", [("a reason", losses), (None, linear_cross_entropy)])
def test_the_fused_head_runs_in_triton_where_that_runs(monkeypatch, reason, chosen):
    monkeypatch.setattr("mini_forge.providers.reason_not", lambda device: reason)
    monkeypatch.setattr(chosen, "token_nll", lambda *arguments: "chosen")
    assert token_nll(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)) == "chosen"


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a CUDA device triton is imported")
@pytest.mark.parametrize(("quantized", "recompute"), [(True, None), (False, None), (False, "selective")])
def test_a_run_on_the_cpu_imports_neither_kernels_nor_compilers(quantized, recompute, tiny, tmp_path):
    """They cost a start up to 2 s and 150 MiB. The triton that is found here cannot be imported."""
    package = tmp_path / "path" / "triton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('wanted')")
    settings = {
        "task": "text-generation", "model_name": str(tiny), "dataset": str(write_rows(tmp_path / "rows.jsonl", 20)),
        "output_dir": str(tmp_path / "run"), "compute_specs": "low_end", "device": "cpu", "provider": "unsloth",
        "use_4bit": quantized, "optim": "adamw_torch", "gradient_checkpointing": recompute is not None,
        **({"recompute": recompute} if recompute else {}), "max_steps": 2, "save_strategy": "no",
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", RUN, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(Triton needs a CUDA device, this is cpu)" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"
