"""Frozen weights in 4, 8 or 16 bits: the linear layers that hold them, and the form in which files hold them.

4 bits (NF4, FP4, nested statistics): model/fourbit.py. 8 bits, LLM.int8 (2208.07339): W ≈ weight · SCB / 127, SCB the
largest magnitude of each row. 16 bits: bfloat16 as a checkpoint stores it, under float32 activations. Products are made
by an op that takes W as it is stored (`Ops.stored_products`), or else with a dense W that exists for that product only.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mini_forge.errors import CheckpointError, UserError
from mini_forge.model.allocation import fresh
from mini_forge.model.fourbit import (
    BLOCKSIZES,
    CHUNK,
    CODES,
    FLOATS,
    NESTED_BLOCKSIZE,
    Quantized4bit,
    backend,
    dequantize_4bit,
    dynamic_map,
    quantize_4bit,
)
from mini_forge.model.frozen import IN_TORCH, FrozenProducts, Low, low_and_factor, low_product

__all__ = [
    "Linear16bit", "Linear4bit", "Linear8bit", "Quantized4bit", "Quantized8bit", "backend",
    "dequantize_4bit", "dequantized_weight", "frozen_gradient", "frozen_products", "is_used_as_stored", "quantize_4bit",
    "quantize_8bit",
]  # fmt: skip


@dataclass(frozen=True)
class Quantized8bit:
    """An 8-bit weight: numbers int8 (out, in), scales float32 (out,); W = numbers · scales."""

    numbers: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape


class Linear4bit(nn.Module):
    """A frozen linear layer stored in 4 bits: y = x Wᵀ + b, computed in `compute_dtype`, returned in x's dtype.

    Its buffers are all it stores: packed, absmax, and for nested statistics nested_absmax and nested_offset. What makes
    it dense is `dequantize`; what multiplies it as it is stored is, where there is one, `matmul` on a GPU (see
    `stacks.use_kernels`) and `stored_products` on the CPU (`Ops.stored_products`)."""

    dequantize = staticmethod(dequantize_4bit)
    matmul = stored_products = None

    def __init__(self, quantized: Quantized4bit, bias: torch.Tensor | None = None, compute_dtype=None):
        super().__init__()
        q = quantized
        self.out_features, self.in_features = q.shape
        self.quant_type, self.blocksize, self.weight_dtype = q.quant_type, q.blocksize, q.dtype
        self.compute_dtype = compute_dtype or q.dtype
        self.register_buffer("packed", q.packed)
        self.register_buffer("absmax", q.stored_absmax)
        self.register_buffer("nested_absmax", q.nested_absmax)
        self.register_buffer("nested_offset", q.nested_offset)
        self.register_parameter("bias", _frozen(bias))

    @classmethod
    def from_weight(cls, weight, bias=None, quant_type="nf4", nested=False, compute_dtype=None) -> "Linear4bit":
        """Quantize a dense (out, in) weight."""
        return cls(quantize_4bit(weight, quant_type, nested), bias, compute_dtype)

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor], bias=None, compute_dtype=None) -> "Linear4bit":
        """From the tensors bitsandbytes stores of a layer, keyed "weight", "weight.absmax", …, bit for bit.

        Raises CheckpointError where one is missing or of another size than the rest say."""
        return cls(_unpack_state(state), bias, compute_dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """The layer as bitsandbytes stores it: what `from_state` takes."""
        return _pack_state(self.quantized)

    @property
    def quantized(self) -> Quantized4bit:
        shape = torch.Size((self.out_features, self.in_features))
        return Quantized4bit(self.packed, self.absmax, shape, self.weight_dtype, self.quant_type, self.blocksize,
                             self.nested_absmax, self.nested_offset)  # fmt: skip

    stored = quantized  # what `stored_products` take

    def dequantized(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W (out, in), in memory of its own, or in `out`."""
        return self.dequantize(self.quantized, dtype, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self.bias, self)

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtypes(self, fn), recurse)


class Linear8bit(nn.Module):
    """A frozen linear layer stored in 8 bits: `weight` int8 (out, in) and `SCB` float32 (out,), as bitsandbytes names
    them.

    Weights only: W is made anew in `compute_dtype` and x is left as it is. LLM.int8 also rounds x to 8 bits but for
    columns above 6.0; not rounding x is closer to the unquantized layer, in forward and in dX = dY W alike, and needs
    no outlier rule. The memory is the same."""

    stored_products = None  # as Linear4bit's

    def __init__(self, weight: torch.Tensor, SCB: torch.Tensor, bias=None, compute_dtype=torch.float32):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.register_buffer("weight", weight)
        self.register_buffer("SCB", SCB)
        self.register_parameter("bias", _frozen(bias))

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias=None, compute_dtype=None) -> "Linear8bit":
        """Quantize a dense (out, in) weight."""
        return cls(*quantize_8bit(weight), bias, compute_dtype or weight.dtype)

    @classmethod
    def from_state(cls, weight: torch.Tensor, SCB: torch.Tensor, bias=None, compute_dtype=torch.float32):
        """From the tensors bitsandbytes stores of a layer. Raises CheckpointError where they do not fit together."""
        if weight.dtype != torch.int8 or weight.dim() != 2 or SCB.numel() != weight.shape[0]:
            raise CheckpointError(
                f"weight, SCB: {weight.dtype} {list(weight.shape)} with {SCB.numel()} scales is not an 8-bit layer, "
                "which has int8 (out, in) with one scale a row"
            )
        return cls(weight, SCB.float().view(-1), bias, compute_dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """The layer as bitsandbytes stores it; weight_format 0 is rows as they are."""
        return {"weight": self.weight, "SCB": self.SCB, "weight_format": torch.zeros((), dtype=torch.uint8)}

    @property
    def stored(self) -> Quantized8bit:
        return Quantized8bit(self.weight, self.SCB / 127)

    def dequantized(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W (out, in) = weight · SCB/127, in memory of its own, or in `out`."""
        if out is None:
            out = torch.empty_like(self.weight, dtype=dtype or self.compute_dtype)
        scale = self.stored.scales[:, None]
        rows = max(1, CHUNK // self.in_features) if out.device.type == "cpu" else self.out_features
        for i in range(0, self.out_features, rows):
            out[i : i + rows].copy_(self.weight[i : i + rows]).mul_(scale[i : i + rows])  # ±127 is exact in any dtype
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self.bias, self)

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtypes(self, fn), recurse)


class Linear16bit(nn.Module):
    """A frozen linear layer of float32 activations whose `weight` (out, in) is kept in bfloat16: y = x Wᵀ + b, without
    another rounding than a float32 weight's product has. On the CPU its products are `stored_products`
    (`Ops.stored_products`); elsewhere W is made float32."""

    compute_dtype = torch.float32

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, stored_products: FrozenProducts):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.stored_products = stored_products
        self.register_buffer("weight", weight)
        self.register_parameter("bias", _frozen(bias))

    @property
    def stored(self) -> torch.Tensor:
        return self.weight

    def dequantized(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W (out, in), in memory of its own, or in `out`."""
        return self.weight.to(dtype or self.compute_dtype, copy=True) if out is None else out.copy_(self.weight)

    def dense(self) -> nn.Linear:
        """The layer in float32."""
        layer = nn.Linear(self.in_features, self.out_features, device="meta")
        layer.weight, layer.bias = _frozen(self.dequantized()), self.bias
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self.bias, self)

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtypes(self, fn), recurse)


Linear = nn.Linear | Linear4bit | Linear8bit | Linear16bit


def dequantized_weight(layer: Linear, dtype: torch.dtype) -> torch.Tensor:
    """W (out, in) of any linear layer in `dtype`, on loan: a quantized layer's is overwritten by the next call.

    Use it at once, in a product whose backward is written by hand. On CPU it lies in one buffer per thread and dtype,
    which grows to the largest weight seen: fresh pages would cost as much as dequantizing (4096² floats: 64 MiB). The
    buffer belongs to the thread, so threads do not meet in it. Elsewhere torch's caching allocator is that buffer, one
    of each size: it hands the block that a product has freed to the next, in the order of the stream."""
    if isinstance(layer, nn.Linear):
        return layer.weight.to(dtype)
    device = next(layer.buffers()).device
    if device.type != "cpu":  # not into a buffer: some decoders make a tensor of their own, which would be a second one
        return layer.dequantized(dtype)
    return layer.dequantized(out=_buffer((layer.out_features, layer.in_features), dtype, device))


def is_used_as_stored(layer: Linear, x: torch.Tensor) -> bool:
    """Whether products of activations x and a layer's weight are its `stored_products`."""
    if isinstance(layer, nn.Linear) or layer.stored_products is None:
        return False
    return x.dtype == layer.compute_dtype == torch.float32 and x.device.type == "cpu"


def frozen_products(x: torch.Tensor, layers: Sequence[Linear], lows: Sequence[Low] | None = None) -> list[torch.Tensor]:
    """x Wᵀ + b (N, out) of linear layers that share x (N, in), in their compute_dtype (a dense one's: x's), returned in
    x's dtype. lows: of each layer, what `FrozenProducts` calls low.

    For functions whose backward is written by hand, like the next: what is saved here for autograd may be on loan."""
    lows, outs = lows or [None] * len(layers), []
    for layer, low in zip(layers, lows, strict=True):
        if is_used_as_stored(layer, x):
            outs.append(layer.stored_products.product_t(x, layer.stored, _biases(x, layer), low))
        else:
            out = _product(x, layer)
            outs.append(out if low is None else low_product(low_and_factor(low, x), True, out))
    return outs


def _product(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    compute = _compute_dtype(layer, x)
    bias = None if layer.bias is None else layer.bias.to(compute)
    if isinstance(layer, Linear4bit) and layer.matmul:
        return layer.matmul(x.to(compute), layer.quantized, bias).to(x.dtype)
    return F.linear(x.to(compute), dequantized_weight(layer, compute), bias).to(x.dtype)


def _biases(x: torch.Tensor, layer: Linear) -> torch.Tensor | None:
    """What a product is to be added to."""
    if layer.bias is None:
        return None
    return fresh((len(x), layer.out_features), x.dtype, x.device).copy_(layer.bias)


def frozen_gradient(
    grad: torch.Tensor, layer: Linear, onto: torch.Tensor | None = None, low: tuple | None = None
) -> torch.Tensor:
    """dY W (N, in) for dY (N, out), in its dtype, or that added to `onto` (N, in) in place. low: see
    `FrozenProducts`."""
    if is_used_as_stored(layer, grad):
        return layer.stored_products.product(grad, layer.stored, onto, low)
    compute = _compute_dtype(layer, grad)
    if low is not None:  # first: memory that has just been written is near
        onto = low_product(low, False, onto)
    left, weight = grad.to(compute), dequantized_weight(layer, compute)
    if onto is not None and compute == onto.dtype:
        return IN_TORCH.product(left, weight, onto)
    product = IN_TORCH.product(left, weight).to(grad.dtype)
    return product if onto is None else onto.add_(product)


def _compute_dtype(layer: Linear, x: torch.Tensor) -> torch.dtype:
    return getattr(layer, "compute_dtype", x.dtype)


def quantize_8bit(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) float → int8 (out, in) and SCB, float32 (out,): round(127·w/SCB), SCB the largest |w| of the row.

    The weight passes through float16 first, as bitsandbytes' does. Raises UserError for what float16 cannot hold."""
    # Some rows at a time, in buffers made once: temporaries would otherwise be six times the result, and even small
    # ones, made and freed a thousand times between results that stay, leave the heap in pieces.
    rows = max(1, min(CHUNK // weight.shape[1], len(weight)))
    shape, device = (rows, weight.shape[1]), weight.device
    half, scaled = _buffer(shape, torch.float16, device), _buffer(shape, torch.float32, device)
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        count = len(scale[part])
        h = half[:count].copy_(weight[part].detach())
        scale[part] = torch.maximum(h.amax(dim=1), -h.amin(dim=1))
        factor = torch.where(scale[part] > 0, 127.0 / scale[part], 0.0)  # a row of zeros stays zeros
        packed[part] = scaled[:count].copy_(h).mul_(factor[:, None]).round_()
    if not bool(scale.isfinite().all()):
        raise UserError("weight: holds NaN, infinity or a magnitude above 65504, which the 8-bit form cannot hold")
    return packed, scale


_LOANED = threading.local()


def _buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of that shape, on CPU the same at every call from one thread."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count, name = shape[0] * shape[1], str(dtype).removeprefix("torch.")  # the name of an attribute, for torch.compile
    buffer = _LOANED.__dict__.get(name)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside of it
            buffer = _LOANED.__dict__[name] = torch.empty(count, dtype=dtype)
    return buffer[:count].view(shape)


class _FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + b. Saves the layer, not its dense weight: backward makes W again for dX = dY W."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return frozen_products(x.reshape(-1, x.shape[-1]), [layer])[0].view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            flat = frozen_gradient(grad.reshape(-1, grad.shape[-1]), ctx.layer)
            grad_x = flat.view(*grad.shape[:-1], ctx.layer.in_features)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.layer.bias.dtype)
        return grad_x, grad_bias, None


def _frozen(bias: torch.Tensor | None) -> nn.Parameter | None:
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def _keep_dtypes(layer: nn.Module, fn):
    """fn, as `.to()`, `.half()` and `.float()` apply it, but for the layer's own buffers only devices change: scales
    rounded to 16 bits would be another weight."""
    own = {id(buffer) for buffer in layer.buffers(recurse=False)}

    def apply(tensor):
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in own and moved.dtype != tensor.dtype else moved

    return apply


def _pack_state(q: Quantized4bit) -> dict[str, torch.Tensor]:
    record = {"quant_type": q.quant_type, "blocksize": q.blocksize, "dtype": str(q.dtype).removeprefix("torch."),
              "shape": list(q.shape)}  # fmt: skip
    code = torch.tensor(CODES[q.quant_type])
    state = {"weight": q.packed, "weight.absmax": q.stored_absmax, "weight.quant_map": code}
    if q.nested:
        state |= {"weight.nested_absmax": q.nested_absmax, "weight.nested_quant_map": dynamic_map().clone()}
        record |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32",
                   "nested_offset": q.nested_offset.item()}  # fmt: skip
    text = json.dumps(record).encode()
    return state | {f"weight.quant_state.bitsandbytes__{q.quant_type}": torch.tensor(list(text), dtype=torch.uint8)}


def _unpack_state(state: dict[str, torch.Tensor]) -> Quantized4bit:
    try:
        (key,) = [k for k in state if k.startswith("weight.quant_state.bitsandbytes__")]
        record = json.loads(bytes(state[key].tolist()))
        quant_type, shape, blocksize = record["quant_type"], torch.Size(record["shape"]), record["blocksize"]
        dtype = {str(d).removeprefix("torch."): d for d in FLOATS}[record["dtype"]]
        packed, absmax, code = state["weight"], state["weight.absmax"], state["weight.quant_map"]
        nested_absmax = offset = None
        if "weight.nested_absmax" in state:
            nested_absmax, offset = state["weight.nested_absmax"].float(), torch.tensor(record["nested_offset"])
            _check_code("weight.nested_quant_map", state["weight.nested_quant_map"], dynamic_map())
        expected_code = torch.tensor(CODES[quant_type])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"weight: not a whole bitsandbytes 4-bit layer ({reason}); fetch it again") from None
    _check_code("weight.quant_map", code, expected_code)
    packed = packed.contiguous().view(torch.uint8).view(-1, 1)  # some are stored as another dtype of the same bytes
    blocks = -(-shape.numel() // blocksize) if blocksize in BLOCKSIZES else -1
    is_nested_sound = nested_absmax is None or nested_absmax.numel() == -(-blocks // record["nested_blocksize"])
    if packed.numel() != (shape.numel() + 1) // 2 or absmax.numel() != blocks or not is_nested_sound or len(shape) != 2:
        raise CheckpointError(
            f"weight: {packed.numel()} bytes and {absmax.numel()} scales do not fit shape {list(shape)} in blocks of "
            f"{blocksize}; the checkpoint is damaged, or of a form that is not known here"
        )
    absmax = absmax.view(-1) if nested_absmax is not None else absmax.float().view(-1)
    return Quantized4bit(packed, absmax, shape, dtype, quant_type, blocksize, nested_absmax, offset)


def _check_code(name: str, stored: torch.Tensor, expected: torch.Tensor):
    # linspace may differ in the last bit between machines; a really different code is a different format.
    if stored.shape != expected.shape or not torch.allclose(stored.float().cpu(), expected, rtol=0, atol=1e-6):
        raise CheckpointError(f"{name}: is not the code of this quantization type; the checkpoint is of another format")
