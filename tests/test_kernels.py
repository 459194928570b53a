"""Every fused function equals its reference in value and in every gradient, at odd shapes, in every dtype."""

import pytest
import torch

from mini_forge.model.ops import PLAIN
from mini_forge.providers import PROVIDERS
from mini_forge_kernels import rms_norm, rope, swiglu
from tests.tiny import random_model

# Float32 differs by the order of sums; bfloat16 (8 bits, 2⁻⁸ = 0.004) by where it is rounded between.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SHAPES = [(1, 1, 2), (7, 3, 6), (13, 5, 34)]


def inputs(name, shape, dtype, weight_trains):
    generator = torch.Generator().manual_seed(0)

    def random(*size, grad=True):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    N, H, C = shape
    if name == "rms_norm":
        return [random(*shape), random(C, grad=weight_trains), 1e-5]
    if name == "apply_rope":
        angle = torch.randn(N, C // 2, generator=generator, dtype=torch.float64).repeat(1, 2)
        return [random(*shape), angle.cos().to(dtype), angle.sin().to(dtype)]
    return [random(*shape), random(*shape)]


CASES = [
    ("rms_norm", rms_norm.rms_norm, rms_norm.reference),
    ("apply_rope", rope.apply_rope, rope.reference),
    ("swiglu", swiglu.swiglu, swiglu.reference),
]


@pytest.mark.parametrize("name, fused, reference", CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("weight_trains", [False, True])
def test_fused_equals_reference(name, fused, reference, shape, dtype, weight_trains):
    if dtype == torch.float64 and name == "rms_norm":
        pytest.skip("the reference takes its mean in float32")
    one, two = (inputs(name, shape, dtype, weight_trains) for _ in range(2))
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = fused(*one), reference(*two)
    scale = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 4}
    torch.testing.assert_close(a, b, **scale)
    a.backward(upstream)
    b.backward(upstream)
    for x, y in zip(one, two, strict=True):
        if isinstance(x, torch.Tensor) and y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, **scale)


def test_rms_norm_gradient_is_its_finite_difference():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.rms_norm(x, w, 1e-5), (x, weight))


def test_fused_decoder_equals_plain_decoder():
    provider = PROVIDERS["unsloth"]()
    plain, fused = random_model(model_type="qwen3", head_dim=12), random_model(model_type="qwen3", head_dim=12)
    for module in fused.modules():
        if getattr(module, "ops", None) is PLAIN:
            module.ops = provider.ops
    ids = torch.randint(0, 272, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (plain, fused):
        model.logits(ids).square().sum().backward()
        results.append([model.logits(ids), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_a_provider_says_what_is_in_use_and_what_is_missing():
    assert PROVIDERS["huggingface"]().describe() == "ops: plain"
    text = PROVIDERS["unsloth"]().describe()
    assert text.startswith("ops: fused (rms_norm, apply_rope, swiglu)")
    assert "attention" in text
