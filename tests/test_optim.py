"""Optimizers against torch's and bitsandbytes' own, exact resumption, parameter groups and clipping."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.training.loop import Progress, Resumable
from mini_forge.training.optim import (
    OPTIMIZERS,
    clip_grad_norm,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parameter_groups,
)

SHAPES = [(64, 100), (7, 9), (300,), (16, 2000), (4095,), (4096,)]  # on both sides of 4096 values


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, params, first, last):
    """Steps first … last - 1 with gradients that depend on step and parameter, and a learning rate that moves."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 300)
        for p in params:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) + 0.1 * p.detach()
        optimizer.step()


def groups(params, weight_decay=0.1):
    return [{"params": params[:4], "weight_decay": weight_decay}, {"params": params[4:], "weight_decay": 0.0}]


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_32bit"])
def test_32_bit_optimizers_equal_plain_adamw_over_many_steps(name):
    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(name, groups(ours), 1e-3, 0.1, "cpu")
    train(optimizer, ours, 0, 200)
    reference = torch.optim.AdamW(groups(theirs), lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    train(reference, theirs, 0, 200)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # 200 steps, an ulp (1e-7) of disorder now and then


def test_adamw_equals_the_formula_in_float64():
    (p,) = [nn.Parameter(torch.linspace(-1, 1, 50))]
    optimizer = make_optimizer("adamw_torch", [p], 1e-2, 0.1, "cpu")
    expected, m, v = p.detach().double(), torch.zeros(50).double(), torch.zeros(50).double()
    for t in range(1, 31):
        p.grad = torch.cos(torch.arange(50) * 0.3 + t)
        g = p.grad.double()
        expected = expected * (1 - 1e-2 * 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = expected - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
@pytest.mark.parametrize(("name", "theirs"), [("adamw_8bit", "AdamW8bit"), ("paged_adamw_8bit", "PagedAdamW8bit")])
def test_8_bit_optimizers_are_bitsandbytes_own(name, theirs):
    import bitsandbytes.optim

    a, b = parameters(), parameters()
    train(make_optimizer(name, groups(a), 1e-3, 0.1, "cpu"), a, 0, 20)
    train(getattr(bitsandbytes.optim, theirs)(groups(b), lr=1e-3, weight_decay=0.1), b, 0, 20)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_8_bit_states_only_from_4096_values_on_and_close_to_32_bit_training():
    ours, exact = parameters(), parameters()
    optimizer = make_optimizer("adamw_8bit", groups(ours), 1e-3, 0.1, "cpu")
    train(optimizer, ours, 0, 50)
    train(make_optimizer("adamw_torch", groups(exact), 1e-3, 0.1, "cpu"), exact, 0, 50)
    for p, q in zip(ours, exact, strict=True):
        is_8_bit = optimizer.state[p]["state1"].dtype == torch.uint8
        assert is_8_bit == (p.numel() >= 4096)
        # 50 steps of 1e-3 move a value by up to 0.05; 8-bit moments may turn a tenth of that elsewhere
        assert (p - q).abs().max() < (5e-3 if is_8_bit else 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_equal_five_saved_loaded_and_five_more(name):
    straight, stopped = parameters(), parameters()
    train(make_optimizer(name, groups(straight), 1e-3, 0.1, "cpu"), straight, 0, 10)
    optimizer = make_optimizer(name, groups(stopped), 1e-3, 0.1, "cpu")
    train(optimizer, stopped, 0, 5)
    state = optimizer_state(optimizer)
    resumed = [nn.Parameter(p.detach().clone()) for p in stopped]
    rate = optimizer.param_groups[0]["lr"]
    train(optimizer, stopped, 5, 7)  # the state is a copy: going on must not change it
    state = saved_and_read(state)
    assert not any("qmap1" in values for values in state["state"])  # a constant
    fresh = make_optimizer(name, groups(resumed, 0.7), 9.0, 0.9, "cpu")
    load_optimizer_state(fresh, state)
    assert [(g["lr"], g["weight_decay"]) for g in fresh.param_groups] == [(rate, 0.1), (rate, 0.0)]
    train(fresh, resumed, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    again = optimizer_state(fresh)
    assert again["kind"] == state["kind"] and len(again["state"]) == len(SHAPES)


def test_state_of_an_optimizer_that_never_stepped_loads():
    for name in OPTIMIZERS:
        params = parameters()
        load_optimizer_state(make_optimizer(name, params, 1e-3, 0.1, "cpu"),
                             optimizer_state(make_optimizer(name, params, 1e-3, 0.1, "cpu")))  # fmt: skip


def test_state_of_another_kind_number_or_shape_is_refused_before_anything_changes():
    params = parameters()
    optimizer = make_optimizer("adamw_8bit", params, 1e-3, 0.1, "cpu")
    train(optimizer, params, 0, 1)
    state = optimizer_state(optimizer)
    other = make_optimizer("adamw_torch", params, 1e-3, 0.1, "cpu")
    with pytest.raises(CheckpointError, match="AdamW8bit.*AdamW"):
        load_optimizer_state(other, state)
    with pytest.raises(CheckpointError, match="6 parameters in 1 groups"):
        load_optimizer_state(make_optimizer("adamw_8bit", params[:2], 1e-3, 0.1, "cpu"), state)
    turned = [nn.Parameter(torch.zeros(100, 64)), *params[1:]]
    fresh = make_optimizer("adamw_8bit", turned, 5.0, 0.1, "cpu")
    with pytest.raises(CheckpointError, match=r"parameter 0 has shape \[64, 100\]"):
        load_optimizer_state(fresh, state)
    assert fresh.param_groups[0]["lr"] == 5.0 and not fresh.state


def test_unknown_names_and_devices_without_a_kernel_are_config_errors():
    with pytest.raises(ConfigError, match="'adam'.*adamw_torch"):
        make_optimizer("adam", parameters(), 1e-3, 0.0, "cpu")
    with pytest.raises(ConfigError, match="8-bit states need cpu or cuda, not mps"):
        make_optimizer("adamw_8bit", parameters(), 1e-3, 0.0, "mps")


def test_no_decay_for_biases_norms_and_nothing_at_all_for_frozen_parameters():
    model = nn.ModuleDict({"up": nn.Linear(4, 5), "norm": nn.LayerNorm(5), "frozen": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    model.experts_bias = nn.Parameter(torch.zeros(2, 3))
    decayed, plain = parameter_groups(model.named_parameters(), 0.01)
    assert [p is model["up"].weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 0.01
    expected = {model["up"].bias, model["norm"].weight, model["norm"].bias, model.experts_bias}
    assert set(plain["params"]) == expected and plain["weight_decay"] == 0.0
    assert len(parameter_groups([("lora_A", nn.Parameter(torch.zeros(2, 2)))], 0.01)) == 1


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_clipping_equals_torch(max_norm):
    ours, theirs = parameters(), parameters()
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if i != 2:  # one parameter without a gradient
            p.grad, q.grad = p.detach() * i, q.detach() * i
    norm = clip_grad_norm(iter(ours), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=0)


def test_clipping_by_hand_and_the_cases_without_it():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_grad_norm([p, q], 0) == 5 and p.grad[0] == 3  # 0: no clipping
    assert clip_grad_norm([p, q], 1.0) == 5
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.0]))
    assert clip_grad_norm([nn.Parameter(torch.zeros(1))], 1.0) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_returned(bad):
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, bad, 2.0])
    assert not clip_grad_norm([p], 1.0).isfinite()


def test_float16_gradients_do_not_overflow_the_norm():
    p = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    p.grad = torch.full((100,), 1e4, dtype=torch.float16)
    assert clip_grad_norm([p], 1e9).item() == pytest.approx(1e5, rel=1e-6)  # above 65504


def test_groups_of_parameters_may_have_a_share_of_the_rate():
    """As LoRA+ (2402.12354) has it for B."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 16.0}], lr=1.0)
    loop = Resumable()
    loop.optimizer, loop.parameters, loop.scaler = optimizer, parameters, None
    loop.progress, loop.settings = Progress(), SimpleNamespace(max_grad_norm=0)
    sum(parameter.sum() for parameter in parameters).backward()
    loop._optimizer_step(0.01)
    assert parameters[0].tolist() == pytest.approx([0.99] * 2) and parameters[1].tolist() == pytest.approx([0.84] * 2)
