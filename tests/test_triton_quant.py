"""Triton's dequantizing has the bits of torch's, and its products those weights: under the interpreter, or on a GPU."""

import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mini_forge.model import fourbit, mxfp4
from mini_forge.model.fourbit import quantize_4bit
from mini_forge.model.grouped import grouped_products
from mini_forge.model.ops import PLAIN
from mini_forge.model.quant import Linear4bit
from mini_forge.model.stacks import Stack4bit, StackMxfp4, use_kernels
from mini_forge_kernels import dequantize
from mini_forge_kernels.triton_support import reason_not_testable

pytestmark = [
    pytest.mark.skipif(reason_not_testable() is not None, reason=str(reason_not_testable())),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, of infinities
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [("nf4", False), ("fp4", True), ("mxfp4", False)]
# Of the sum of |x·w|. Float32: K = 200 products in another order. Else one rounding of the result, half a unit of 8 or
# 11 bits, and the order.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mxfp4(*shape, seed=0, scales=(0, 255)):
    *rows, blocks = shape
    packed = torch.randint(256, (*rows, blocks, 16), generator=generator(seed), dtype=torch.uint8)
    return packed.to(DEVICE), torch.randint(*scales, shape, generator=generator(seed), dtype=torch.uint8).to(DEVICE)


def same_bits(a, b):
    """Equal but for the sign of a NaN and of FP4's second zero."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# One weight; odd counts; a last block that is short; widths that are no multiple of 64; several programs, and several
# blocks of nested statistics (256 · 64 weights).
SHAPES = [(1, 1), (3, 33), (1, 2), (5, 50), (7, 129), (64, 64), (70, 257)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_4_bits_dequantize_to_the_same_bits(quant_type, nested, shape, monkeypatch):
    monkeypatch.setattr(fourbit, "backend", lambda device: ("torch", "the reference of this test"))
    weight = torch.randn(shape, generator=generator()).to(DEVICE)
    for blocksize in (64, 128):
        quantized = quantize_4bit(weight, quant_type, nested, blocksize)
        for dtype in DTYPES:
            ours, reference = (f(quantized, dtype) for f in (dequantize.dequantize_4bit, fourbit.dequantize_4bit))
            assert same_bits(ours, reference), (dtype, blocksize)
        assert dequantize.dequantize_4bit(quantized).dtype == weight.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_fall_between_two_of_16_bits_are_rounded_to_the_even_one(dtype, monkeypatch):
    """Scales that make products with every pattern of low bits, in magnitudes from subnormal numbers to infinity."""
    monkeypatch.setattr(fourbit, "backend", lambda device: ("torch", "the reference of this test"))
    rng = random.Random(0)
    quantized = quantize_4bit(torch.randn(64, 64, generator=generator()).to(DEVICE))
    scales = [rng.uniform(1, 2) * 10.0 ** rng.randint(-40, 38) for _ in range(61)] + [float("inf"), 0.0, 1 + 2**-8]
    quantized.stored_absmax.copy_(torch.tensor(scales))
    ours, reference = (f(quantized, dtype) for f in (dequantize.dequantize_4bit, fourbit.dequantize_4bit))
    assert same_bits(ours, reference) and reference.isinf().any() and reference.isnan().any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 3), (1, 80), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_dequantizes_to_the_same_bits(shape, dtype):
    blocks, scales = random_mxfp4(*shape)
    if scales.numel() > 3:  # 2⁻¹²⁷ makes subnormal numbers, 254 infinity, 255 is NaN
        scales.view(-1)[:4] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    ours, reference = (f(blocks, scales, dtype) for f in (dequantize.dequantize_mxfp4, mxfp4.dequantize_mxfp4))
    assert same_bits(ours, reference)
    if dtype != torch.float16:  # exact, so the sign of zero as well
        assert torch.equal(torch.signbit(ours)[~ours.isnan()], torch.signbit(reference)[~reference.isnan()])


def test_every_code_of_mxfp4_by_hand():
    blocks = torch.tensor([[[16 * (2 * i + 1) + 2 * i for i in range(8)] * 2]], dtype=torch.uint8, device=DEVICE)
    weights = dequantize.dequantize_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8, device=DEVICE))
    magnitudes = [0, 1, 2, 3, 4, 6, 8, 12]  # at a scale of 2
    assert weights[0, :16].tolist() == magnitudes + [-m for m in magnitudes]


def test_a_buffer_is_written_and_decides_the_dtype():
    quantized = quantize_4bit(torch.randn(9, 40, generator=generator()).to(DEVICE), nested=True)
    blocks, scales = random_mxfp4(5, 2)
    for dtype in DTYPES:
        out = torch.full((9, 40), 7.0, dtype=dtype, device=DEVICE)
        assert dequantize.dequantize_4bit(quantized, out=out) is out
        assert same_bits(out, fourbit.dequantize_4bit(quantized, dtype))
        memory = torch.full((7, 64), 7.0, dtype=dtype, device=DEVICE)  # what lies around `out` is left alone
        assert dequantize.dequantize_mxfp4(blocks, scales, out=memory[1:6]).data_ptr() == memory[1:6].data_ptr()
        assert same_bits(memory[1:6], mxfp4.dequantize_mxfp4(blocks, scales, dtype))
        assert (memory[0] == 7).all() and (memory[6] == 7).all()


def stored(kind, nested, out_features, in_features):
    """The product of a stored weight as a function of x and bias, and the weight made dense by torch."""
    if kind == "mxfp4":
        blocks, scales = random_mxfp4(out_features, in_features // 32, scales=(120, 130))
        return (lambda x, b: dequantize.matmul_mxfp4(x, blocks, scales, b)), (
            lambda dtype: mxfp4.dequantize_mxfp4(blocks, scales, dtype)
        )
    quantized = quantize_4bit(torch.randn(out_features, in_features, generator=generator()).to(DEVICE), kind, nested)
    return (lambda x, b: dequantize.matmul_4bit(x, quantized, b)), (
        lambda dtype: fourbit.dequantize_4bit(quantized, dtype)
    )


# Rows: one, odd, one tile, one more than a tile (which dequantizes first). Blocks that begin within a row: 50, 66.
SIZES = [(1, 33, 128), (5, 50, 96), (17, 1, 160), (64, 40, 64), (65, 40, 64), (3, 7, 50), (2, 9, 66), (2, 5, 33)]


@pytest.mark.parametrize("kind, nested", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_those_of_the_dequantized_weight(kind, nested, size, dtype):
    N, out_features, in_features = size
    if kind == "mxfp4" and in_features % 32:
        return
    product, dense = stored(kind, nested, out_features, in_features)
    x = torch.randn(N, in_features, generator=generator(1)).to(DEVICE, dtype).requires_grad_()
    for bias in (None, torch.randn(out_features, generator=generator(2)).to(DEVICE, dtype)):
        y = product(x, bias)
        weight = dense(dtype).double()
        exact = F.linear(x.double(), weight, None if bias is None else bias.double())
        size_of_terms = F.linear(x.double().abs(), weight.abs()) + 1
        assert y.dtype == dtype and ((y - exact).abs() <= TOLERANCE[dtype] * size_of_terms).all()
        upstream = torch.randn(y.shape, generator=generator(3)).to(DEVICE, dtype)
        (grad,) = torch.autograd.grad(y, x, upstream)
        expected, terms = upstream.double() @ weight, upstream.double().abs() @ weight.abs() + 1
        assert grad.dtype == dtype and ((grad - expected).abs() <= TOLERANCE[dtype] * terms).all()


def test_products_take_any_leading_shape_and_no_rows():
    product, dense = stored("nf4", True, 6, 64)
    x = torch.randn(2, 3, 64, generator=generator()).to(DEVICE)
    torch.testing.assert_close(product(x, None), x @ dense(torch.float32).t())
    torch.testing.assert_close(product(x.transpose(0, 1), None), (x @ dense(torch.float32).t()).transpose(0, 1))
    assert product(x[:0], None).shape == (0, 3, 6)


def quantized_model():
    """A 4-bit layer, a 4-bit stack of three experts and an MXFP4 one, all 64 → 10 or 12."""
    linear = Linear4bit.from_weight(torch.randn(10, 64, generator=generator()), torch.ones(10), nested=True)
    four_bit = Stack4bit.empty(3, 12, 64, "nf4", nested=True)
    for e, weight in enumerate(torch.randn(3, 12, 64, generator=generator(1))):
        four_bit.put(e, weight)
    blocks, scales = random_mxfp4(3, 12, 2, scales=(120, 130))
    return nn.ModuleList((linear, four_bit, StackMxfp4(blocks.cpu(), scales.cpu()))).to(DEVICE)


@pytest.mark.parametrize("rows", [(3, 0, 2), (0, 70, 1)], ids=["few", "many"])
def test_a_model_that_uses_kernels_gives_what_it_gave(rows, monkeypatch):
    model, x = quantized_model(), torch.randn(sum(rows), 64, generator=generator()).to(DEVICE).requires_grad_()

    def results():
        outs = [model[0](x), *(grouped_products(x, stack, None, rows) for stack in model[1:])]
        return [*outs, *(torch.autograd.grad(y.square().sum(), x)[0] for y in outs), *(s.expert(1) for s in model[1:])]

    before = [tensor.clone() for tensor in results()]
    launches, launch = [], dequantize.launch
    monkeypatch.setattr(dequantize, "launch", lambda *a, **k: launches.append(a[0]) or launch(*a, **k))
    four_bit = (dequantize.dequantize_4bit, dequantize.matmul_4bit)
    mxfp4 = (dequantize.dequantize_mxfp4, dequantize.matmul_mxfp4)
    use_kernels(model, replace(PLAIN, four_bit=four_bit, mxfp4=mxfp4))
    for found, expected in zip(results(), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().amax().item())
    # Each of the layer and two stacks: forward and backward for each expert with rows, and expert(1) once a stack.
    assert len(launches) == 2 + 2 * (2 * 2) + 2
    assert launches.count(dequantize._few_rows_kernel) == (5 if rows == (3, 0, 2) else 2)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mini_forge_kernels import dequantize, grouped_lora, linear_cross_entropy

def compiled(kernel, types, constants, **options):
    names, types = kernel.arg_names, types.split()
    left = iter(types)
    signature = {name: "constexpr" if name in constants else next(left) for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]

form = {"BLOCKSIZE": 64, "FORM": 1, "EMULATES": False}
ptx = compiled(dequantize._dequantize_kernel, "*bf16 *u8 *u8 *fp32 *fp32 *fp32 *fp32 i32", form | {"BYTES": 1024},
               enable_fp_fusion=False)
print("fma" in ptx, ".ftz" in ptx)
print(".ftz" in compiled(dequantize._dequantize_kernel, "*fp32 *u8 *u8 i32", {"BLOCKSIZE": 32, "FORM": 2, "BYTES": 1024,
      "EMULATES": False} | dict.fromkeys(("code", "nested_code", "nested_absmax", "nested_offset"))))
print("mma" in compiled(dequantize._few_rows_kernel, "*bf16 *bf16 *bf16 *u8 *u8 *fp32 *fp32 *fp32 *fp32 i32 i32",
                        form | {"ROW_BYTES": 512, "ROWS": 16, "COLUMNS": 32, "BYTES": 64}, enable_fp_fusion=False))
compiled(linear_cross_entropy._softmax, "*bf16 *i64 *fp32 *fp32", {"V": 128256, "WRITES": True, "BLOCK": 4096})
print("mma" in compiled(grouped_lora._by_expert, "*bf16 *bf16 *fp32 *i32 fp32" + 7 * " i32", {"K": 8, "N": 768,
      "ADDS": True, "DOT": tl.bfloat16, "ROWS": 64, "COLUMNS": 64, "INNER": 16}))
print("mma" in compiled(grouped_lora._over_rows, "*fp32 *bf16 *bf16 *i32 fp32" + 7 * " i32", {"P": 8, "Q": 768,
      "DOT": tl.bfloat16, "P_BLOCK": 16, "Q_BLOCK": 64, "ROWS": 32}))
"""


def test_kernels_compile_for_a_gpu_that_need_not_be_here(tmp_path):
    """To machine code of an A100. Nested scales are not fused into multiply-adds, and no subnormal number is flushed:
    both would be other bits. 16-bit products are made by tensor cores."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    (tmp_path / "compile.py").write_text(COMPILE)  # a file: Triton reads the source of what it compiles
    result = subprocess.run(
        [sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False", "False", "False", "True", "True", "True"]
