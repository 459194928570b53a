"""LoRALinear against the formula written plainly and differentiated by autograd or finite differences."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mini_forge.errors import ConfigError
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import LoRALinear, LoraSpec, disabled, inject, lora_layers, merge, project
from mini_forge.model.low_rank import IN_TORCH, draw_seeds, dropout_keep
from mini_forge.model.ops import Differentiable
from mini_forge.model.products import adapted_products
from mini_forge.model.quant import Linear4bit, Linear8bit
from mini_forge.providers import PROVIDERS
from mini_forge_kernels.low_rank import IN_CPP
from tests.tiny import random_model


def layer(base=None, dtype=torch.float64, **spec):
    base = base or nn.Linear(5, 7).to(dtype)
    made = LoRALinear(base, LoraSpec(**{"rank": 3, "alpha": 6, **spec}), torch.Generator().manual_seed(1))
    made.lora_B.data.normal_(generator=torch.Generator().manual_seed(2))
    return made.to(dtype)


def test_value_is_base_plus_scaled_low_rank_product():
    made = layer()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = x @ made.base.weight.T + made.base.bias + 2.0 * (x @ made.lora_A.T @ made.lora_B.T)
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_equal_finite_differences(dropout):
    made = layer(dropout=dropout).train()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        torch.manual_seed(3)  # the same dropout mask at every evaluation
        made.lora_A.data, made.lora_B.data = A.data, B.data
        return torch.func.functional_call(made, {"lora_A": A, "lora_B": B}, (x,))

    A, B = (p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B))
    assert torch.autograd.gradcheck(run, (x, A, B))


def test_dropout_touches_the_update_only_and_keeps_its_mean():
    made = layer(dropout=0.25).train()
    x = torch.randn(1, 5, dtype=torch.float64)
    torch.manual_seed(0)
    mean = torch.stack([made(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, made.eval()(x), atol=0.25, rtol=0)
    made.lora_B.data.zero_()
    torch.testing.assert_close(made.train()(x), made.base(x))


def test_dropout_mask_has_the_rate_and_follows_the_seed():
    shape = torch.Size((501, 403))
    keep = dropout_keep(shape, 0.1, 7, torch.device("cpu"))
    deviation = math.sqrt(0.1 * 0.9 / shape.numel())
    assert abs(keep.float().mean().item() - 0.9) < 5 * deviation
    assert torch.equal(keep, dropout_keep(shape, 0.1, 7, torch.device("cpu")))
    assert not torch.equal(keep, dropout_keep(shape, 0.1, 8, torch.device("cpu")))
    neighbours = (keep[:, 1:] & keep[:, :-1]).float().mean().item()  # independent: 0.9²
    assert abs(neighbours - 0.81) < 5 * math.sqrt(0.81 * 0.19 / shape.numel()) * 2


@pytest.mark.parametrize("rate", [1 - 2**-12, 1 - 2**-16, 1 - 2**-17, 1 - 2**-40, 1.0])
def test_a_rate_near_one_drops_nearly_all(rate):
    keep = dropout_keep(torch.Size((1000, 1000)), rate, 7, torch.device("cpu"))
    assert keep.float().mean() < 2 * max(1 - rate, 2**-16)


def test_two_projections_of_one_input_draw_different_masks():
    made = layer(dropout=0.5).train()
    x = torch.ones(1, 5, dtype=torch.float64)
    torch.manual_seed(0)
    assert len({tuple(made(x).flatten().tolist()) for _ in range(20)}) > 5


def test_dropout_of_one_leaves_the_base():
    made = layer(dropout=1.0).train()
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x), made.base(x))


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoraSpec(16, 32).scaling == 2.0
    assert LoraSpec(16, 32, use_rslora=True).scaling == 8.0


def test_starts_as_its_base_with_uniform_a():
    made = LoRALinear(nn.Linear(400, 6), LoraSpec(64, 1), torch.Generator().manual_seed(0))
    x = torch.randn(3, 400)
    torch.testing.assert_close(made(x), made.base(x))
    bound = 1 / math.sqrt(400)  # Kaiming uniform, a = √5: √(6 / (6·fan_in))
    assert made.lora_A.abs().max() <= bound
    assert made.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("make", [
    lambda w, b: Linear4bit.from_weight(w, b, quant_type="nf4", nested=False, compute_dtype=torch.float32),
    lambda w, b: Linear4bit.from_weight(w, b, quant_type="fp4", nested=True, compute_dtype=torch.float32),
    lambda w, b: Linear8bit.from_weight(w, b, compute_dtype=torch.float32),
])  # fmt: skip
def test_over_a_quantized_base_equals_lora_over_its_dequantized_weight(make):
    weight, bias = torch.randn(32, 64), torch.randn(32)
    quantized = make(weight, bias)
    dense = nn.Linear(64, 32)
    dense.weight.data, dense.bias.data = quantized.dequantized(torch.float32).clone(), bias
    one, two = layer(quantized, torch.float32), layer(dense, torch.float32)
    for a, b in ((one.lora_A, two.lora_A), (one.lora_B, two.lora_B)):
        b.data = a.data.clone()
    x = torch.randn(6, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (one(x) ** 2).sum().backward()
    (two(y) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(one.lora_A.grad, two.lora_A.grad, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(one.lora_B.grad, two.lora_B.grad, rtol=1e-5, atol=1e-3)


def test_bfloat16_input_keeps_float32_factors_and_gradients():
    made = layer(nn.Linear(5, 7).bfloat16(), torch.float32)
    made.base.bfloat16()
    out = made(torch.randn(2, 5).bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert made.lora_A.dtype == made.lora_A.grad.dtype == torch.float32


def test_inject_wraps_every_linear_but_the_head_and_trains_nothing_else():
    model = random_model()
    names = inject(model, LoraSpec(2, 4))
    assert len(names) == 2 * 7
    assert "lm_head" not in names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{x}" for n in names for x in "AB"}


def test_targets_name_whole_parts():
    names = inject(random_model(), LoraSpec(2, 4, targets=("q_proj", "layers.1.mlp.up_proj")))
    assert names == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    ]  # fmt: skip


def test_unknown_target_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"target_modules: 'proj'.*down_proj.*q_proj"):
        inject(random_model(), LoraSpec(2, 4, targets=("proj",)))


def test_disabled_is_the_base_and_comes_back():
    model, ids = random_model(), torch.arange(10)[None]
    before = model.logits(ids)
    inject(model, LoraSpec(2, 4))
    for _, each in lora_layers(model):
        each.lora_B.data.normal_()
    adapted = model.logits(ids)
    with disabled(model):
        torch.testing.assert_close(model.logits(ids), before)
    torch.testing.assert_close(model.logits(ids), adapted)
    assert not torch.allclose(adapted, before)


def test_merged_model_gives_the_adapters_logits():
    model, ids = random_model(), torch.arange(10)[None]
    inject(model, LoraSpec(2, 4, use_rslora=True))
    for _, each in lora_layers(model):
        each.lora_B.data.normal_(std=0.1)
    adapted = model.logits(ids)
    torch.testing.assert_close(merge(model).logits(ids), adapted, rtol=1e-4, atol=1e-4)
    assert not list(lora_layers(model))


def test_merging_into_quantized_weights_is_refused():
    holder = nn.Sequential(layer(Linear8bit.from_weight(torch.randn(4, 8), None, compute_dtype=torch.float32),
                                 torch.float32))  # fmt: skip
    with pytest.raises(ConfigError, match="quantized"):
        merge(holder)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("alphas", [(6, 6), (6, 15)])
def test_shared_projections_have_the_gradients_of_finite_differences(dropout, alphas):
    layers = [layer(dropout=dropout, alpha=alpha).train() for alpha in alphas]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    factors = [p.detach().clone().requires_grad_() for one in layers for p in (one.lora_A, one.lora_B)]

    def run(x, *factors):
        torch.manual_seed(3)
        return adapted_products(None, (x,), layers, draw_seeds(layers), factors)

    assert torch.autograd.gradcheck(run, (x, *factors))


def test_shared_projections_equal_separate_ones_and_respect_disabling():
    layers = [layer(alpha=alpha).train() for alpha in (6, 9, 6)]
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for together, alone in zip(project(x, *layers), [one(x) for one in layers], strict=True):
        torch.testing.assert_close(together, alone)
    layers[1].enabled = False
    outs = project(x, *layers, nn.Identity())
    torch.testing.assert_close(outs[1], layers[1].base(x))
    torch.testing.assert_close(outs[2], layers[2](x))
    assert outs[3] is x


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
@pytest.mark.parametrize("make", [None, nn.Identity()], ids=["itself", "made"])
@pytest.mark.parametrize(("low_rank", "dtype"), [(IN_TORCH, torch.float64), (IN_CPP, torch.float32)])
def test_of_no_tokens_there_is_a_gradient_too(low_rank, dtype, shape, make):
    layers = [layer(dtype=dtype).train() for _ in range(2)]
    for one in layers:
        one.low_rank = low_rank
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    outs = adapted_products(make and Differentiable.of(make), (x,), layers, draw_seeds(layers))
    sum(out.sum() for out in outs).backward()
    assert x.grad.shape == shape and not layers[0].lora_B.grad.any() and not layers[1].lora_A.grad.any()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("base", [Scaled(4, 4), nn.Conv1d(4, 4, 1), LoRALinear(nn.Linear(4, 4), LoraSpec(2, 4))],
                         ids=["own forward", "no linear", "adapted"])  # fmt: skip
def test_layers_whose_products_are_not_of_their_weight_are_refused(base):
    with pytest.raises(
        ConfigError, match=f"base: {type(base).__name__} cannot be adapted; give one of Linear, Linear4"
    ):
        LoRALinear(base, LoraSpec(2, 4))


def test_a_model_is_adapted_once():
    model = random_model()
    inject(model, LoraSpec(2, 4))
    with pytest.raises(ConfigError, match="has an adapter already; merge it"):
        inject(model, LoraSpec(2, 4))


def test_factors_are_float32_under_any_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = LoRALinear(nn.Linear(4, 4, dtype=torch.float32), LoraSpec(2, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


class Doubled(LoRALinear):
    """What somebody may try: an update of their own, beside or around ours."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), None], ids=["some", "all"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_subclass_s_forward_is_what_the_model_computes(targets, grad):
    """Every adapted layer says twice as much; so does the same model with twice the weights and B."""
    models = [random_model() for _ in range(2)]
    for model in models:
        inject(model, LoraSpec(4, 8, targets=targets), torch.Generator().manual_seed(0))
        for i, (_, layer) in enumerate(lora_layers(model)):
            layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
            if model is models[0]:
                layer.__class__ = Doubled
            else:
                layer.base.weight.data *= 2
                layer.lora_B.data *= 2
    ids = torch.arange(12)[None]
    with torch.set_grad_enabled(grad):
        ours, expected = (model(ids) for model in models)
    torch.testing.assert_close(ours, expected)
    if grad:
        for model in models:
            model(ids).square().sum().backward()
        for (name, a), (_, b) in zip(*(lora_layers(model) for model in models), strict=True):
            torch.testing.assert_close(a.lora_B.grad, 2 * b.lora_B.grad, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("state", ["plain", "adapted", "some adapted", "off"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_are_told_of_every_call_and_may_change_it(state, grad):
    model = random_model()
    if state != "plain":
        inject(model, LoraSpec(4, 8, targets=("q_proj", "down_proj") if state == "some adapted" else None))
    names, calls = [], []
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            names.append(name)
            module.register_forward_hook(lambda module, args, out, name=name: calls.append(name) or 2 * out)
    twice = random_model()
    for name, module in twice.named_modules():
        if name.endswith("_proj"):
            module.weight.data *= 2
    ids = torch.arange(12)[None]
    with torch.set_grad_enabled(grad), disabled(model) if state == "off" else nullcontext():
        torch.testing.assert_close(model(ids), twice(ids))
    assert sorted(calls) == sorted(names) and len(names) == 14


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["subclass", "instance"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_without_an_adapter_is_called_too_where_its_forward_is_another(how, grad):
    model, twice = random_model(), random_model()
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            twice.get_submodule(name).weight.data *= 2
            if how == "subclass":
                module.__class__ = Twice
            else:
                module.forward = lambda x, weight=module.weight: 2 * x @ weight.t()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(torch.arange(12)[None]), twice(torch.arange(12)[None]))


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("where", ["norm", "projection", "base"])
def test_what_a_hook_changes_the_gradient_knows(where, recompute):
    """A hook that doubles what a module gives, against the same model with doubled weights."""
    models = [random_model(), random_model()]
    for model in models:
        inject(model, LoraSpec(4, 8), torch.Generator().manual_seed(0))
        for i, (_, layer) in enumerate(lora_layers(model)):
            layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
        model.recompute = recompute
    hooked, doubled = models
    for name, module in list(hooked.named_modules()):
        other = doubled.get_submodule(name)
        if where == "norm" and name.endswith("layernorm"):
            other.weight.data *= 2
        elif where == "projection" and name.endswith("_proj"):
            other.base.weight.data *= 2
            other.scaling *= 2
        elif where == "base" and name.endswith("_proj.base"):
            other.weight.data *= 2
        else:
            continue
        module.register_forward_hook(lambda module, args, out: 2 * out)
    for model in models:
        model.train()(torch.arange(12)[None]).square().mean().backward()
    for (name, a), (_, b) in zip(*(lora_layers(model) for model in models), strict=True):
        torch.testing.assert_close(a.lora_A.grad, b.lora_A.grad, msg=name, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.lora_B.grad, b.lora_B.grad, msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("provider", ["huggingface", "unsloth"])
def test_a_caller_s_autocast_disturbs_nothing(provider):
    """The rest runs in bfloat16 then, attention among it: results are near."""
    model = Decoder(random_model().spec, PROVIDERS[provider]("cpu").ops)
    model.load_state_dict(random_model().state_dict())
    inject(model, LoraSpec(4, 8), torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            hidden = model.train()(torch.arange(12)[None])
        model.zero_grad()
        hidden.float().square().mean().backward()
        found.append([hidden.detach().float(), *(layer.lora_A.grad.clone() for _, layer in lora_layers(model))])
    for exact, near in zip(*found, strict=True):
        assert float((exact - near).norm() / exact.norm()) < 0.05
