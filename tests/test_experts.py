"""Mixtures of experts against a loop over tokens in float64, written from the definition, and its autograd."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import mini_forge.model.grouped as grouped_module
import mini_forge.model.lora as lora_module
from mini_forge.errors import ConfigError
from mini_forge.model.decoder import MLP
from mini_forge.model.experts import MixtureOfExperts, Router, _PermuteRows
from mini_forge.model.grouped import blocks, grouped_products
from mini_forge.model.lora import LoRALinear, LoraSpec, LoRAStack, disabled, inject, lora_layers, merge, target_names
from mini_forge.model.mxfp4 import quantize_mxfp4
from mini_forge.model.ops import PLAIN
from mini_forge.model.rope import RopeSpec
from mini_forge.model.spec import DecoderSpec, ExpertsSpec, LayerSpec
from mini_forge.model.stacks import Stack4bit, Stack8bit, StackMxfp4
from tests.tiny import random_model

D, E, W = 32, 5, 8
MOE = {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
       "moe_intermediate_size": 16}  # fmt: skip


def spec_of(activation="silu", clamp=(7.0, 1.702), **experts):
    wanted = ExpertsSpec(**{"count": E, "top_k": 2, "size": W, **experts})
    return DecoderSpec(
        vocab_size=8, hidden_size=D, mlp_size=12, heads=1, kv_heads=1, head_size=D, layers=(LayerSpec(experts=True),),
        rope=RopeSpec(1e4), norm_eps=1e-6, max_positions=8, experts=wanted, activation=activation, clamp=clamp,
    )  # fmt: skip


def mixture(spec, dtype=torch.float64):
    shared = spec.experts.shared_size
    made = MixtureOfExperts(spec, PLAIN, None if shared is None else MLP(spec, shared, PLAIN)).to(dtype)
    generator = torch.Generator().manual_seed(4)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=dtype, generator=generator) * parameter.shape[-1] ** -0.5
    return made.requires_grad_(False)


def unit_by_the_book(spec, gate, up):
    if spec.activation == "clamped":
        limit, slope = spec.clamp
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return gate / (1 + torch.exp(-slope * gate)) * (up + 1)
    return gate / (1 + torch.exp(-gate)) * up


def expert_by_the_book(module, spec, e, x):
    experts = module.experts
    both = experts.gate_up_proj[e] @ x
    if spec.experts.bias:
        both = both + experts.gate_up_proj_bias[e]
    out = experts.down_proj[e] @ unit_by_the_book(spec, both[: spec.experts.size], both[spec.experts.size :])
    return out + experts.down_proj_bias[e] if spec.experts.bias else out


def mixture_by_the_book(module, spec, x):
    """One token at a time, one expert at a time."""
    router, rows = module.get_submodule(spec.experts.router_name), []
    for token in x:
        logits = router.weight @ token + (router.bias if spec.experts.router_bias else 0)
        chosen = sorted(range(len(logits)), key=lambda e: -float(logits[e].detach()))[: spec.experts.top_k]
        total = torch.zeros_like(token)
        if spec.experts.router == "sigmoid":
            for e in chosen:
                total = total + expert_by_the_book(module, spec, e, token / (1 + torch.exp(-logits[e])))
        else:
            odds = torch.exp(logits - logits.max())
            whole = sum(odds[e] for e in chosen) if spec.experts.normalized else odds.sum()
            for e in chosen:
                total = total + odds[e] / whole * expert_by_the_book(module, spec, e, token)
        if module.shared_expert is not None:
            mlp = module.shared_expert
            hidden = unit_by_the_book(spec, mlp.gate_proj.weight @ token, mlp.up_proj.weight @ token)
            total = total + mlp.down_proj.weight @ hidden
        rows.append(total)
    return torch.stack(rows)


MIXTURES = {
    "normalised": {},
    "not normalised": {"normalized": False},
    "router and expert biases": {"router_bias": True, "bias": True},
    "clamped with biases": {"activation": "clamped", "clamp": (0.4, 1.3), "router_bias": True, "bias": True},
    "sigmoid, shared": {"router": "sigmoid", "top_k": 1, "shared_size": 12, "router_name": "router"},
    "sigmoid, two": {"router": "sigmoid", "top_k": 2},
    "all experts": {"top_k": E},
    "all experts, not normalised": {"top_k": E, "normalized": False},
    "one expert": {"count": 1, "top_k": 1},
    "many experts, most without rows": {"count": 40, "top_k": 2},
}


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", MIXTURES)
def test_values_and_input_gradients_equal_the_definition(name, tokens):
    spec = spec_of(**MIXTURES[name])
    module = mixture(spec)
    x = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = module(ours), mixture_by_the_book(module, spec, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the router's softmax is float32
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_the_definition_of_these_tests_by_hand():
    """Two experts, width one: E0 doubles and passes on silu(x)·x, E1 gives nothing; p = softmax([1, 0])."""
    spec = replace(spec_of(count=2, top_k=1, size=1, normalized=False), hidden_size=1)
    module = mixture(spec)
    module.gate.weight.data = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    module.experts.gate_up_proj.data = torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]]], dtype=torch.float64)
    module.experts.down_proj.data = torch.ones(2, 1, 1, dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    probability, silu = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-1))
    assert float(module(x)) == pytest.approx(probability * silu * 2, rel=1e-6)
    assert float(mixture_by_the_book(module, spec, x)) == pytest.approx(probability * silu * 2, rel=1e-12)


def test_the_sigmoid_is_on_the_input_not_the_output():
    """The clamp makes the difference: scaling the output would give another value."""
    spec = spec_of(router="sigmoid", top_k=1, activation="clamped", clamp=(0.2, 1.0))
    module, x = mixture(spec), torch.randn(4, D, dtype=torch.float64)
    logits = module.gate(x).max(-1)
    on_output = torch.stack([
        torch.sigmoid(v) * expert_by_the_book(module, spec, int(e), t) for v, e, t in zip(*logits, x, strict=True)
    ])  # fmt: skip
    assert (module(x) - on_output).abs().max() > 0.01


def test_scores_are_float32_probabilities_in_bfloat16_models():
    """128 experts: a bfloat16 softmax would round each probability to 8 bits before they are divided by their sum."""
    module = mixture(spec_of(count=128, top_k=8), torch.bfloat16)
    logits = torch.randn(16, 128).bfloat16()
    scores, chosen = module._route(logits)
    wide = logits.double().softmax(-1).gather(1, chosen)
    assert torch.equal(scores, (wide / wide.sum(-1, keepdim=True)).float().bfloat16())
    assert scores.dtype == torch.bfloat16


def test_bfloat16_in_bfloat16_out():
    for name in MIXTURES:
        module = mixture(spec_of(**MIXTURES[name]), torch.bfloat16)
        x = torch.randn(3, D).bfloat16().requires_grad_()
        out = module(x)
        out.float().sum().backward()
        assert out.dtype == x.grad.dtype == torch.bfloat16


def test_permuted_rows_have_the_gradient_of_finite_differences():
    order = torch.tensor([3, 0, 2, 1])
    inverse = order.argsort()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(_PermuteRows.apply(x, order, inverse), x[order])
    assert torch.autograd.gradcheck(lambda x: _PermuteRows.apply(x, order, inverse), (x,))


COUNTS = [[3, 0, 2, 0, 1], [0, 0, 6, 0, 0], [1, 1, 1, 2, 1], [6, 0, 0, 0, 0], [0, 0, 0, 0, 6]]


def test_blocks_are_the_rows_of_experts_that_have_rows():
    assert list(blocks([3, 0, 2, 0])) == [(0, slice(0, 3)), (2, slice(3, 5))]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products_and_their_gradient(counts, has_bias):
    stack, rows = torch.randn(E, 7, 4, dtype=torch.float64), sum(counts)
    bias = torch.randn(E, 7, dtype=torch.float64) if has_bias else None
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([stack[e] @ row + (bias[e] if has_bias else 0) for e, row in zip(expert, x, strict=True)])
    torch.testing.assert_close(grouped_products(x, stack, bias, counts), expected)
    assert torch.autograd.gradcheck(lambda x: grouped_products(x, stack, bias, counts), (x,))


def quantized(kind: str, weights: torch.Tensor) -> nn.Module:
    count, out, width = weights.shape
    if kind == "mxfp4":
        stack = StackMxfp4.empty(count, out, width)
        for e, weight in enumerate(weights):
            stack.put_packed(e, *quantize_mxfp4(weight))
        return stack
    stack = Stack8bit.empty(count, out, width) if kind == "int8" else Stack4bit.empty(count, out, width, kind, True)
    for e, weight in enumerate(weights):
        stack.put(e, weight)
    return stack


@pytest.mark.parametrize("counts", COUNTS[:2])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "mxfp4"])
def test_quantized_stacks_multiply_as_their_dequantized_weight(kind, counts):
    stack = quantized(kind, torch.randn(E, 24, 64, generator=torch.Generator().manual_seed(0)))
    dense = torch.stack([stack.expert(e, torch.float32).clone() for e in range(E)])
    assert len({float(w.sum()) for w in dense}) == E
    bias, inputs = torch.randn(E, 24), torch.randn(sum(counts), 64)
    weight = torch.randn(sum(counts), 24)
    outs, grads = [], []
    for form in (stack, dense):
        x = inputs.clone().requires_grad_()
        out = grouped_products(x, form, bias, counts)
        (out * weight).sum().backward()
        outs.append(out), grads.append(x.grad)
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "mxfp4"])
def test_adapters_over_quantized_stacks_are_adapters_over_their_dequantized_weight(kind):
    counts, stack = [3, 0, 2, 1], quantized(kind, torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(0)))
    dense = nn.Parameter(torch.stack([stack.expert(e, torch.float32).clone() for e in range(4)]), requires_grad=False)
    results = []
    for base in (stack, dense):
        made = adapted_stack(base, torch.float32)
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        made(x, None, counts).square().sum().backward()
        results.append([x.grad, made.lora_A.grad, made.lora_B.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def adapted_stack(base=None, dtype=torch.float64, **spec) -> LoRAStack:
    base = nn.Parameter(torch.randn(E, 7, 4, dtype=dtype), requires_grad=False) if base is None else base
    made = LoRAStack(base, LoraSpec(**{"rank": 3, "alpha": 6, **spec}), torch.Generator().manual_seed(1))
    made.lora_B.data.normal_(generator=torch.Generator().manual_seed(2))
    made.lora_A.data, made.lora_B.data = made.lora_A.data.to(dtype), made.lora_B.data.to(dtype)
    return made.train()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_adapted_stacks_equal_the_dense_formula(counts, has_bias):
    """W_e + 2·B_e A_e for every expert, differentiated by autograd."""
    made = adapted_stack()
    bias = torch.randn(E, 7, dtype=torch.float64) if has_bias else None
    inputs, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    x, y = (inputs.clone().requires_grad_() for _ in range(2))
    A, B = (p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B))
    whole = made.base + 2.0 * B @ A
    expected = torch.stack([whole[e] @ row + (bias[e] if has_bias else 0) for e, row in zip(expert, y, strict=True)])
    found = made(x, bias, counts)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in ((x, y), (made.lora_A, A), (made.lora_B, B)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_under_dropout_equal_finite_differences():
    made = adapted_stack(dropout=0.4)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        torch.manual_seed(3)  # the same dropout mask at every evaluation
        return torch.func.functional_call(made, {"lora_A": A, "lora_B": B}, (x, None, [3, 0, 2, 0, 1]))

    A, B = (p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B))
    assert torch.autograd.gradcheck(run, (x, A, B))


def test_dropout_touches_the_update_only_keeps_its_mean_and_follows_the_seed():
    made, counts = adapted_stack(dropout=0.25), [1, 0, 1, 0, 0]
    x = torch.randn(2, 4, dtype=torch.float64)

    def draw(seed):
        torch.manual_seed(seed)
        return made(x, None, counts)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(0)
    draws = torch.stack([made(x, None, counts) for _ in range(4000)])
    error = 5 * draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - made.eval()(x, None, counts)).abs() <= error).all()
    assert bool((draws.std(0) > 0).all())
    made.lora_B.data.zero_()
    torch.testing.assert_close(made.train()(x, None, counts), grouped_products(x, made.base, None, counts))


def test_dropout_zeroes_inputs_at_its_rate():
    """With A and B ones and a base of zeros, each output counts the inputs that were kept, over 1 - rate."""
    made = adapted_stack(nn.Parameter(torch.zeros(1, 1, 1)), torch.float32, rank=1, alpha=1, dropout=0.2)
    made.lora_A.data.fill_(1.0), made.lora_B.data.fill_(1.0)
    torch.manual_seed(0)
    out = made(torch.ones(20000, 1), None, [20000])
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert (out > 0).float().mean().item() == pytest.approx(0.8, abs=5 * math.sqrt(0.8 * 0.2 / 20000))


def test_dropout_of_one_leaves_the_base():
    made, x = adapted_stack(dropout=1.0), torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(made(x, None, [2, 0, 0, 0, 0]), x @ made.base[0].T)


def test_starts_as_its_base_with_uniform_factors_of_each_expert():
    base = nn.Parameter(torch.randn(3, 6, 400), requires_grad=False)
    made = LoRAStack(base, LoraSpec(64, 1), torch.Generator().manual_seed(0))
    x = torch.randn(3, 400)
    torch.testing.assert_close(made(x, None, [1, 1, 1]), grouped_products(x, base, None, [1, 1, 1]))
    bound = 1 / math.sqrt(400)
    for A in made.lora_A:
        assert A.abs().max() <= bound
        assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not torch.equal(made.lora_A[0], made.lora_A[1])


def test_bfloat16_input_keeps_float32_factors_and_gradients():
    made = adapted_stack(nn.Parameter(torch.randn(E, 7, 4).bfloat16(), requires_grad=False), torch.float32)
    out = made(torch.randn(6, 4).bfloat16(), None, COUNTS[0])
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert made.lora_A.dtype == made.lora_A.grad.dtype == made.lora_B.grad.dtype == torch.float32


# --- in a model


def adapted_model(targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"), std=0.1, **spec):
    model = random_model(**MOE)
    names = inject(model, LoraSpec(2, 4, targets=targets, **spec), torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(std=std, generator=torch.Generator().manual_seed(i))
    return model, names


def test_stacks_are_adapted_on_request_only():
    plain = random_model(**MOE)
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
    stacks = [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")]
    assert target_names(plain, None) == attention
    assert target_names(plain, ("experts.gate_up_proj", "experts.down_proj")) == stacks
    assert target_names(plain, ("layers.1.mlp.experts.down_proj", "q_proj")) == [*attention[::4], stacks[3]]


def test_a_stack_is_not_meant_by_the_name_of_a_linear_layer():
    shared = {"model_type": "llama4_text", "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 1,
              "intermediate_size_mlp": 24, "intermediate_size": 16}  # fmt: skip
    names = target_names(random_model(**shared), ("down_proj",))
    assert names == [f"model.layers.{i}.feed_forward.shared_expert.down_proj" for i in (0, 1)]
    with pytest.raises(ConfigError, match=r"'down_proj' names no linear layer.*experts.down_proj, experts.gate_up"):
        target_names(random_model(**MOE), ("down_proj",))


def test_routers_are_never_adapted_or_quantized():
    with pytest.raises(ConfigError, match="target_modules: 'gate'"):
        inject(random_model(**MOE), LoraSpec(2, 4, targets=("gate",)))
    assert not isinstance(random_model(**MOE).model.layers[0].mlp.gate, nn.Linear)


def test_inject_freezes_all_but_the_factors():
    model, names = adapted_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{x}" for n in names for x in "AB"}
    kinds = {type(layer) for _, layer in lora_layers(model)}
    assert kinds == {LoRALinear, LoRAStack}
    assert isinstance(model.model.layers[0].mlp.gate, Router)


def test_disabled_is_the_base_and_comes_back():
    ids = torch.arange(12)[None]
    before = random_model(**MOE).logits(ids)
    model, _ = adapted_model(("experts.gate_up_proj", "experts.down_proj"))
    adapted = model.logits(ids)
    with disabled(model):
        assert torch.equal(model.logits(ids), before)
    assert torch.equal(model.logits(ids), adapted) and not torch.allclose(adapted, before)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_stacks_give_the_adapters_logits_and_have_w_plus_ba(use_rslora):
    model, _ = adapted_model(use_rslora=use_rslora)
    ids, stack = torch.arange(12)[None], model.model.layers[1].mlp.experts.gate_up_proj
    adapted, scaling = model.logits(ids), 4 / math.sqrt(2) if use_rslora else 2.0
    expected = stack.base.double() + scaling * stack.lora_B.double() @ stack.lora_A.double()
    merged = merge(model)
    torch.testing.assert_close(merged.logits(ids), adapted, rtol=1e-4, atol=1e-4)
    assert not list(lora_layers(merged))
    found = merged.model.layers[1].mlp.experts.gate_up_proj
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert type(found) is nn.Parameter and not found.requires_grad


def test_merging_rounds_once_to_the_stacks_dtype():
    base = torch.randn(2, 60, 40).bfloat16()
    holder, made = nn.Module(), adapted_stack(nn.Parameter(base.clone(), requires_grad=False), torch.float32)
    holder.experts = nn.Module()
    holder.experts.down_proj = made
    expected = (base.double() + 2.0 * made.lora_B.double() @ made.lora_A.double()).float().bfloat16()
    merge(holder)
    assert (holder.experts.down_proj == expected).float().mean() > 0.999  # a sum on the edge may go either way
    assert holder.experts.down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8", "mxfp4"])
def test_merging_into_quantized_stacks_is_refused(kind):
    holder = nn.Module()
    holder.experts = nn.Module()
    holder.experts.down_proj = adapted_stack(quantized(kind, torch.randn(2, 8, 32)), torch.float32)
    with pytest.raises(ConfigError, match="quantized"):
        merge(holder)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_gradient_even_with_dropout(recompute):
    def gradients(recompute):
        model, _ = adapted_model(dropout=0.3, std=1.0)
        model.train().recompute = recompute
        torch.manual_seed(5)
        model(torch.arange(20)[None]).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    found, expected = gradients(recompute), gradients(None)
    assert len(found) == 12
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0]])
def test_one_grouped_product_equals_the_loop_over_experts(counts, dtype, monkeypatch):
    """The kernel that CUDA uses, in its CPU form: results, and the gradients of x, A and B."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Parameter(torch.randn(4, 16, 24, generator=generator).to(dtype), requires_grad=False)
    stack = LoRAStack(base, LoraSpec(8, 16), generator)
    stack.lora_B.data.normal_(generator=generator)
    start = torch.randn(10, 24, generator=generator).to(dtype)

    def outcome():
        x = start.clone().requires_grad_()
        out = stack(x, None, counts)
        grads = torch.autograd.grad(out.float().square().sum(), [x, stack.lora_A, stack.lora_B])
        return [out, *grads]

    looped = outcome()
    calls = []
    monkeypatch.setattr(grouped_module, "is_groupable", lambda *_: True)
    monkeypatch.setattr(lora_module, "is_groupable", lambda *_: calls.append(1) or True)
    at_once = outcome()
    assert calls
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bfloat16 keeps 8 bits
    for one, other in zip(looped, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.detach().abs().max()))
