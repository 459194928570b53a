"""Every fused function equals its reference in value and in all gradients: odd shapes, strides, dtypes; torch, Triton.

Triton kernels run on a GPU where there is one, else under Triton's interpreter (`conftest.py` asks for it).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mini_forge_kernels
from mini_forge import providers
from mini_forge.model import functional
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec
from mini_forge.providers import PROVIDERS, fused
from mini_forge_kernels import amx_product, frozen_product, rms_norm, rope, rowwise, swiglu, triton_support
from mini_forge_kernels.triton_support import IS_INTERPRETED, reason_not_testable
from tests.tiny import CONFIG
from tests.tiny_experts import CONFIGS, SHARED

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(reason_not_testable() is not None, reason=str(reason_not_testable()))
EPS, LIMIT, SLOPE = 1e-5, 1.25, 1.702  # a limit that a good part of random numbers pass


def triton_swiglu(gate, up):
    return swiglu.TritonSwiGLU.apply(gate, up, None, 1.0)


# What each takes, and the tensors among it that get gradients. Names, then: formula, CPU version, Triton version.
OPS = {
    "rms_norm": (
        lambda x, w: functional.rms_norm(x, w, EPS),
        lambda x, w: rms_norm.rms_norm(x, w, EPS),
        lambda x, w: rms_norm.TritonRMSNorm.apply(x, w, EPS),
    ),
    "apply_rope": (
        functional.apply_rope,
        rope.apply_rope,
        lambda x, cos, sin: rope.TritonRotation.apply(x, x[:, :0], cos, sin)[0],
    ),
    "rope_qk": (
        lambda q, k, cos, sin: (functional.apply_rope(q, cos, sin), functional.apply_rope(k, cos, sin)),
        rope.rope_qk,
        rope.TritonRotation.apply,
    ),
    "swiglu": (functional.swiglu, swiglu.swiglu, triton_swiglu),
    "clamped_swiglu": (
        lambda g, u: functional.clamped_swiglu(g, u, LIMIT, SLOPE),
        lambda g, u: swiglu.clamped_swiglu(g, u, LIMIT, SLOPE),
        lambda g, u: swiglu.TritonSwiGLU.apply(g, u, LIMIT, SLOPE),
    ),
}
# No rows; one row; one column; widths that are no power of two; a row longer than a block; more heads than a tile.
WIDTHS = [(0, 6), (1, 1), (4, 1), (1, 5), (6,), (7, 3, 6), (13, 5, 33), (2, 1500)]
HEADS = [(0, 3, 6), (1, 1, 2), (7, 3, 6), (13, 5, 34), (2, 40, 10)]
CASES = [(op, shape) for op in OPS for shape in (HEADS if "rope" in op else WIDTHS)]


def half(x):
    return torch.cat((x, x), dim=-1)[..., x.shape[-1] :]


# How the i-th input, and the i-th upstream gradient, lies in memory.
LAYOUTS = {
    "contiguous": lambda x, i: x,
    "halves of a projection": lambda x, i: half(x),
    "first a half": lambda x, i: half(x) if i == 0 else x,
    "second a half": lambda x, i: half(x) if i == 1 else x,
    "every other column": lambda x, i: x.repeat_interleave(2, dim=-1)[..., ::2],
    "turned": lambda x, i: x.movedim(0, -1).contiguous().movedim(-1, 0),
}
# Against the formula in float64, as a share of the largest number, or of the 1 that small ones come from by cancelling.
# Float32 is off by the order of sums. A 16-bit number by roundings of half a unit: of 8 bits 2⁻⁸, of 11 bits 2⁻¹¹.
# Torch rounds after each of up to five steps, a kernel once, RMSNorm's twice, as its reference does. The interpreter
# cuts bfloat16 off instead of rounding it: a whole unit.
TOLERANCE = {
    "c++": {torch.float32: 2e-6, torch.bfloat16: 5 * 2**-8, torch.float16: 5 * 2**-11},  # in 16 bits torch's ops
    "torch": {torch.float32: 2e-6, torch.bfloat16: 5 * 2**-8, torch.float16: 5 * 2**-11},
    "triton": {torch.float32: 2e-6, torch.bfloat16: 2 * 2 ** -(7 if IS_INTERPRETED else 8), torch.float16: 2 * 2**-11},
}
needs_compiler = pytest.mark.skipif(rowwise.reason_not() is not None, reason=str(rowwise.reason_not()))
BACKENDS = ["torch", pytest.param("c++", marks=needs_compiler), pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def torch_s_own_ops(request, monkeypatch):
    """Where a test is of torch's ops, those compiled on this machine stand back."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "torch":
        monkeypatch.setattr(rowwise, "reason_not", lambda: "a test of torch's ops")


def place(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def leaves(op, shape, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if op == "rms_norm":
        return [random(*shape), random(shape[-1])]
    if "swiglu" in op:
        return [random(*shape), random(*shape)]
    N, H, C = shape
    angle = torch.randn(N, C // 2, generator=generator, dtype=torch.float64).repeat(1, 2)
    heads = [random(N, H, C), random(N, max(H // 2, 1), C)][: 1 + (op == "rope_qk")]
    return [*heads, angle.cos().to(dtype), angle.sin().to(dtype)]


def results(function, op, tensors, layout, trains, upstream) -> list[torch.Tensor]:
    """Values, then the gradients of the tensors that train, given gradients `upstream` in the same layout."""
    tensors = [x.clone().requires_grad_(train) for x, train in zip(tensors, trains, strict=True)]
    outs = function(*[layout(x, i) if x.dim() > 1 else x for i, x in enumerate(tensors)])
    outs = outs if isinstance(outs, tuple) else (outs,)
    upstream = [layout(g.to(outs[0]), i) if g.dim() > 1 else g.to(outs[0]) for i, g in enumerate(upstream)]
    torch.autograd.backward(outs, upstream)
    return [*outs, *(x.grad for x in tensors if x.requires_grad)]


def check(backend, op, shape, dtype, layout, trains=None, upstream=None):
    formula, *versions = OPS[op]
    function = versions[backend == "triton"]
    tensors = leaves(op, shape, dtype)
    trains = trains or [not ("rope" in op and i >= len(tensors) - 2) for i in range(len(tensors))]
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in tensors[: 1 + (op == "rope_qk")]]
    layout = LAYOUTS[layout]
    expected = results(formula, op, [x.double() for x in tensors], layout, trains, upstream)
    device = place(backend)
    found = results(function, op, [x.to(device) for x in tensors], layout, trains, [g.to(device) for g in upstream])
    assert len(found) == len(expected) == sum(trains) + len(upstream)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        if b.numel():
            limit = TOLERANCE[backend][dtype] * max(b.abs().max().item(), 1.0)
            assert (a.cpu().double() - b).abs().max().item() <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, shape", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE["torch"])
def test_values_and_gradients_are_the_formula_s(backend, op, shape, dtype):
    check(backend, op, shape, dtype, "contiguous")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_any_strides_of_inputs_and_upstream_gradients_are_read(backend, op, layout):
    check(backend, op, (7, 3, 6), torch.float32, layout)
    check(backend, op, (3, 2, 1030) if "rope" not in op else (2, 40, 10), torch.float32, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_an_expanded_upstream_gradient_is_read(backend, op):
    """What `sum().backward()` sends: every stride is 0."""
    ones = [torch.ones(()).expand(7, heads, 6) for heads in ((3, 1) if op == "rope_qk" else (3,))]
    check(backend, op, (7, 3, 6), torch.float32, "contiguous", upstream=ones)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_one_input_alone_may_train(backend, op, trains):
    check(backend, op, (7, 3, 6), torch.float32, "contiguous", trains=list(trains))


@needs_triton
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_a_program_of_rms_norm_may_sum_many_tiles(rows, monkeypatch):
    """With 4 programs of 8 rows a tile the weight's gradient takes up to 8 tiles each, the last ones past the end."""
    monkeypatch.setattr(rms_norm, "TILE", 64)
    monkeypatch.setattr(rms_norm, "DW_PROGRAMS", 4)
    programs = []

    def launch(kernel, count, *arguments, **options):
        programs.append(count)
        triton_support.launch(kernel, count, *arguments, **options)

    monkeypatch.setattr(rms_norm, "launch", launch)
    check("triton", "rms_norm", (rows, 7), torch.float32, "contiguous")
    assert len(programs) == 2 and programs[1] <= 4


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])  # in C++ there is no float64
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_finite_differences(backend, op):
    """In float64, which the kernels keep: in float32 a difference would hold three digits."""
    function = OPS[op][1 + (backend == "triton")]
    tensors = [x.to(place(backend)) for x in leaves(op, (2, 2, 4), torch.float64)]
    trained = tensors[: len(tensors) - 2] if "rope" in op else tensors
    for x in trained:
        x.requires_grad_()
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamping_stops_gradients_beyond_the_limit_and_keeps_them_at_it(backend):
    """By hand, limit 1, slope 2, dh = 1, both inputs on a grid; σ(2) = 0.880797, σ(2)(1 + 2(1 − σ(2))) = 1.090784."""
    version = swiglu.TritonSwiGLU.apply if backend == "triton" else swiglu.clamped_swiglu
    device = place(backend)
    gate = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0], device=device, requires_grad=True)
    up = torch.tensor([1.0, 1.0, 2.0, -1.0, -2.0], device=device, requires_grad=True)
    out = version(gate, up, 1.0, 2.0)
    out.sum().backward()
    sigma, slope = 0.880797, 1.090784
    torch.testing.assert_close(out.cpu(), torch.tensor([2 * sigma] * 3 + [0.0, 0.0]))
    torch.testing.assert_close(gate.grad.cpu(), torch.tensor([2 * slope, 0.0, 2 * slope, 0.0, 0.0]))
    torch.testing.assert_close(up.grad.cpu(), torch.tensor([sigma, sigma, 0.0, sigma, 0.0]))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: exp(10,000) is inf, 1/inf 0
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["swiglu", "clamped_swiglu"])
def test_large_gates_do_not_overflow_and_a_nan_stays_one(backend, op):
    version = OPS[op][1 + (backend == "triton")]
    gate = torch.tensor([-1e4, -100.0, 1e4, float("nan"), 1.0, -1e36], device=place(backend))
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, float("nan"), 1.0], device=place(backend))
    expected = OPS[op][0](gate, up)
    torch.testing.assert_close(version(gate, up), expected, equal_nan=True)
    assert expected.isnan().tolist() == [False] * 3 + [True] * 2 + [False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused(backend, op):
    tensors = [x.to(place(backend)).requires_grad_() for x in leaves(op, (3, 2, 4), torch.float32)]
    out = OPS[op][1 + (backend == "triton")](*tensors)
    out = out[0] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_compiler
def test_in_cpp_nothing_is_broadcast():
    """Where torch would broadcast, or halve an odd width, C++ would read on behind a tensor."""
    x = torch.ones(4, 2, 6)
    wrong = [
        ("weight", lambda: rowwise.rms_norm(x, torch.ones(1), 1e-6)),
        ("grad", lambda: rowwise.rms_norm_gradient(x[:1], x, torch.ones(6), torch.ones(8))),
        ("up", lambda: rowwise.swiglu(x, x[:1])),
        ("up", lambda: rowwise.swiglu_gradient(x, x, x[..., :1])),
        ("grad", lambda: rowwise.swiglu_gradient(x[:1], x, x)),
        ("grad", lambda: rowwise.swiglu_vjp(x[:1], x, x)),
        ("grad", lambda: rowwise.rms_norm_vjp(x[:1], x, torch.ones(6), 1e-6)),
        ("weight", lambda: rowwise.rms_norm_vjp(x, x, torch.ones(1), 1e-6)),
        ("up", lambda: rowwise.swiglu_vjp(x, x, x[..., :1])),
        ("cos", lambda: rowwise.rotate(x, torch.ones(1, 6), torch.ones(1, 6), 1)),
        ("sin", lambda: rowwise.rotate(x, torch.ones(4, 6), torch.ones(4, 3), 1)),
        ("cos", lambda: rowwise.rotate(x[..., :5], torch.ones(4, 5), torch.ones(4, 5), 1)),
    ]
    for name, call in wrong:
        with pytest.raises(ValueError, match=f"{name}: "):
            call()


def decoder(config, ops=None):
    model = Decoder(decoder_spec(config), ops) if ops else Decoder(decoder_spec(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        center = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data = center + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_fused_decoder_equals_plain_decoder(backend, kind, monkeypatch):
    """Normed queries with rotations and SwiGLU; float32 norms, clamped SwiGLU over halves of a projection."""
    if backend == "triton":
        for module in (rms_norm, rope, swiglu):
            monkeypatch.setattr(module, "reason_not", lambda device: None)
    config = {**SHARED, **CONFIGS[kind]} if kind in CONFIGS else {**CONFIG, "model_type": kind, "head_dim": 12}
    ids = torch.randint(0, 272, (2, 5), generator=torch.Generator().manual_seed(0)).to(place(backend))
    found = []
    for model in (decoder(config), decoder(config, fused().ops)):
        model.to(place(backend)).logits(ids).square().mean().backward()
        found.append([model.logits(ids), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


@needs_triton
def test_the_public_functions_go_where_the_device_can(monkeypatch):
    """To torch on the CPU, interpreter or not; to Triton where no reason speaks against it."""
    device = place("triton")
    x, angle = torch.ones(2, 1, 4, device=device, requires_grad=True), torch.ones(2, 4, device=device)
    calls = {
        rms_norm: [lambda x: rms_norm.rms_norm(x, x[0, 0].detach(), EPS)],
        rope: [lambda x: rope.apply_rope(x, angle, angle), lambda x: rope.rope_qk(x, 2 * x, angle, angle)[1]],
        swiglu: [lambda x: swiglu.swiglu(x, x), lambda x: swiglu.clamped_swiglu(x, x, LIMIT, SLOPE)],
    }
    for module, functions in calls.items():
        for function in functions:
            monkeypatch.setattr(module, "reason_not", lambda device: "a reason")
            in_torch = function(x)
            monkeypatch.setattr(module, "reason_not", lambda device: None)
            in_triton = function(x)
            assert in_triton.grad_fn.name().startswith("Triton") and not in_torch.grad_fn.name().startswith("Triton")
            torch.testing.assert_close(in_triton, in_torch)


def test_nothing_is_launched_for_no_programs():
    """A grid of no programs is an error of CUDA's; here there is not even a kernel to launch."""
    triton_support.launch(None, 0, torch.empty(0))


def test_a_reason_is_given_for_each_op_where_triton_does_not_run(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(triton_support, "IS_INSTALLED", False)
    for device in ("cpu", "cuda"):
        reasons = mini_forge_kernels.missing(torch.device(device))
        assert set(reasons) == set(mini_forge_kernels.TRITON_OPS) == {
            *(set(OPS) - {"apply_rope"}), "token_nll", "grouped_lora", "dequantize_4bit", "dequantize_mxfp4"
        }  # fmt: skip
        assert set(reasons.values()) == {"triton is not installed: pip install 'mini-forge[kernels]'"}
    monkeypatch.setattr(triton_support, "IS_INSTALLED", True)
    assert mini_forge_kernels.missing(cpu)["rms_norm"] == "Triton needs a CUDA device, this is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = triton_support._reason_not_gpu.__wrapped__(torch.device("cuda"))
    assert why == "Triton needs compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_support._reason_not_gpu.__wrapped__(torch.device("cuda")) is None


def test_a_provider_says_what_is_in_use_and_what_is_missing(monkeypatch):
    assert PROVIDERS["huggingface"]().describe() == "ops: plain"
    monkeypatch.setattr(providers, "COMPILED", dict.fromkeys(providers.COMPILED, lambda: why_not))
    monkeypatch.setattr(frozen_product, "reason_not", lambda device: why_not)
    monkeypatch.setattr(triton_support, "IS_INSTALLED", True)
    in_cpp, others = "rms_norm, rope_qk, swiglu, clamped_swiglu", "token_nll, grouped_lora"
    stored, rest = "dequantize_4bit, dequantize_mxfp4", "; plain: gelu_glu (no fused form)"
    no_gpu = f"torch: {others}, {stored} (Triton needs a CUDA device, this is cpu)"
    why_not = None
    monkeypatch.setattr(amx_product, "reason_not", lambda: "no AMX")
    described = f"ops: fused; c++: {in_cpp}, attention, low_rank; {no_gpu}; c++: frozen_product (no AMX){rest}"
    assert PROVIDERS["unsloth"]("cpu").describe() == described
    monkeypatch.setattr(amx_product, "reason_not", lambda: None)
    described = f"ops: fused; c++: {in_cpp}, attention, low_rank, frozen_product; {no_gpu}{rest}"
    assert PROVIDERS["unsloth"]("cpu").describe() == described
    why_not = "no g++ here"
    described = f"ops: fused; torch: {in_cpp}, attention, low_rank (no g++ here); {no_gpu}{rest}; plain: frozen_product"
    assert PROVIDERS["unsloth"]("cpu").describe() == described + " (no g++ here)"
    monkeypatch.setattr(mini_forge_kernels, "reason_not", lambda device: None)
    assert PROVIDERS["unsloth"]("cuda").describe() == (
        f"ops: fused; triton: {in_cpp}, {others}, {stored}; plain: attention (torch's own kernels are used); "
        "torch: low_rank" + rest
    )


def test_without_triton_the_fused_path_works_and_says_so():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from mini_forge.providers import fused
from mini_forge_kernels import triton_support
x = torch.ones(2, 3, requires_grad=True)
fused().ops.rms_norm(fused().ops.swiglu(x, x), torch.ones(3), 1e-5).sum().backward()
assert x.grad is not None and not triton_support.IS_INTERPRETED
assert triton_support.reason_not_testable() == triton_support.reason_not(x.device)
print(fused().describe())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "(triton is not installed: pip install 'mini-forge[kernels]')" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 34), (600, 34)], ids=["one thread", "more threads"])
@pytest.mark.parametrize("is_part", [False, True], ids=["a gradient in rows", "part of a wider one"])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_a_vjp_is_the_function_and_its_gradient(name, is_part, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    first, second, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight = torch.randn(34, generator=generator).to(dtype)
    plain, fused = PROVIDERS["huggingface"]().ops, PROVIDERS["unsloth"]("cpu").ops
    inputs = [first] if name == "rms_norm" else [first, second]
    more = (weight, 1e-5) if name == "rms_norm" else ()
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = getattr(plain, name)(*leaves, *more)
    expected.backward(upstream)
    # bfloat16 keeps 8 bits and is rounded in other places
    tolerance = {"rtol": 2e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    for ops in (plain, fused):
        given = torch.cat((upstream, upstream), dim=1)[:, :34] if is_part else upstream.clone()
        sources = [x.clone().requires_grad_() for x in inputs]
        out, grads = getattr(ops, f"{name}_vjp")(given, *sources, *more)
        torch.testing.assert_close(out.detach(), expected.detach(), **tolerance)
        for found, leaf in zip(grads, leaves, strict=True):
            torch.testing.assert_close(found, leaf.grad, **tolerance)
        assert all(map(torch.equal, sources, inputs))  # what may be overwritten is the gradient alone
