"""Frozen stacks of E matrices (out, in), in few bits: how the experts of a layer are held. No dense copy is ever kept.

Three forms with one interface, each an nn.Module of buffers only:

    Stack4bit     NF4 or FP4, nested or not: each expert bit for bit quantize_4bit of its matrix    model/fourbit.py
    Stack8bit     int8 and a scale a row: each expert bit for bit quantize_8bit of its matrix       model/quant.py
    StackMxfp4    the bytes of an MXFP4 checkpoint as they are                                      model/mxfp4.py

    count, out_features, in_features, shape (E, out, in), compute_dtype, stored_bytes
    expert(e, dtype, out)   W (out, in) of one expert, on loan
    matmul, stored(e)       None, or a function of x, *stored(e) → x W_eᵀ that multiplies it as it is stored
    put(e, weight)          quantize and store one expert: loading needs the stack and one matrix (put_packed for MXFP4)
    empty(count, out_features, in_features, ...)   all buffers, uninitialised: what loading fills

Also here: the order of gate and up rows, which some checkpoints interleave.
"""

from dataclasses import replace

import torch
from torch import nn

from mini_forge.errors import CheckpointError, UserError
from mini_forge.model.fourbit import CHUNK, CODES, NESTED_BLOCKSIZE, Quantized4bit, dequantize_4bit, quantize_4bit
from mini_forge.model.mxfp4 import BLOCK, NAN_SCALE, check_packed, dequantize_mxfp4
from mini_forge.model.ops import Ops
from mini_forge.model.quant import Linear4bit, Linear8bit, _buffer, _keep_dtypes, quantize_8bit

BLOCKSIZE = 64  # of Stack4bit: bitsandbytes' default, and what QLoRA (2305.14314) §3 uses


class Stack4bit(nn.Module):
    """E matrices in NF4 or FP4: packed uint8 (E, ⌈n/2⌉) and absmax float32 (E, ⌈n/64⌉), n = out·in; with nested
    statistics absmax uint8, nested_absmax float32 (E, ⌈⌈n/64⌉/256⌉) and nested_offset float32 (E,)."""

    dequantize = staticmethod(dequantize_4bit)
    matmul = None

    def __init__(self, shape, packed, absmax, nested_absmax=None, nested_offset=None, quant_type="nf4",
                 compute_dtype=torch.float32):  # fmt: skip
        super().__init__()
        if quant_type not in CODES:
            raise UserError(f"quant_type: {quant_type!r} must be one of {', '.join(CODES)}")
        _set_shape(self, shape, compute_dtype)
        self.quant_type = quant_type
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_offset", nested_offset)

    @classmethod
    def empty(cls, count: int, out_features: int, in_features: int, quant_type="nf4", nested=False,
              compute_dtype=torch.float32, device=None) -> "Stack4bit":  # fmt: skip
        """Uninitialised; every expert is to be `put`."""
        n = out_features * in_features
        blocks = -(-n // BLOCKSIZE)
        packed = torch.empty((count, -(-n // 2)), dtype=torch.uint8, device=device)
        absmax = torch.empty((count, blocks), dtype=torch.uint8 if nested else torch.float32, device=device)
        nested_absmax = nested_offset = None
        if nested:
            nested_absmax = torch.empty((count, -(-blocks // NESTED_BLOCKSIZE)), dtype=torch.float32, device=device)
            nested_offset = torch.empty(count, dtype=torch.float32, device=device)
        shape = (count, out_features, in_features)
        return cls(shape, packed, absmax, nested_absmax, nested_offset, quant_type, compute_dtype)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def stored_bytes(self) -> int:
        return _stored_bytes(self)

    def put(self, e: int, weight: torch.Tensor):
        """Quantize and store expert e. weight: (out, in), a float dtype, on any device. Raises CheckpointError for
        another shape, UserError for what 4 bits cannot hold."""
        _check_matrix(self, weight)
        q = quantize_4bit(weight, self.quant_type, self.nested, BLOCKSIZE)
        self.packed[e].copy_(q.packed.view(-1))
        self.absmax[e].copy_(q.stored_absmax)
        if self.nested:
            self.nested_absmax[e].copy_(q.nested_absmax)
            self.nested_offset[e].copy_(q.nested_offset)

    def expert(self, e: int, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W (out, in) of expert e in `dtype` (default: compute_dtype), on loan as `dequantized_weight` lends: the next
        call overwrites it. Or in `out`, contiguous, whose dtype decides. Carries no gradient."""
        if self.packed.device.type != "cpu":
            return self.dequantize(*self.stored(e), dtype or self.compute_dtype, out)
        out = _loan(self, dtype) if out is None else out
        flat = out.view(self.out_features * self.in_features)
        # A part at a time, whole blocks of nested scales: those of a whole matrix are n/16 bytes, a few times.
        for start in range(0, flat.numel(), CHUNK):
            stop = min(start + CHUNK, flat.numel())
            self.dequantize(self._part(e, start, stop), out=flat[start:stop])
        return out

    def stored(self, e: int) -> tuple[Quantized4bit]:
        return (replace(self._part(e, 0, self.out_features * self.in_features), shape=self.shape[1:]),)

    def _part(self, e: int, start: int, stop: int) -> Quantized4bit:
        """Weights start … stop of expert e; start is a multiple of CHUNK or 0."""
        first, last = start // BLOCKSIZE, -(-stop // BLOCKSIZE)
        nested = slice(first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE))
        return Quantized4bit(
            self.packed[e, start // 2 : (stop + 1) // 2], self.absmax[e, first:last], torch.Size((stop - start,)),
            self.compute_dtype, self.quant_type, BLOCKSIZE,
            self.nested_absmax[e, nested] if self.nested else None, self.nested_offset[e] if self.nested else None,
        )  # fmt: skip

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtypes(self, fn), recurse)


class Stack8bit(nn.Module):
    """E matrices in 8 bits: `weight` int8 (E, out, in) and `SCB` float32 (E, out), the largest magnitude of each row.
    W = weight · SCB/127."""

    matmul = None

    def __init__(self, weight: torch.Tensor, SCB: torch.Tensor, compute_dtype=torch.float32):
        super().__init__()
        _set_shape(self, weight.shape, compute_dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("SCB", SCB)

    @classmethod
    def empty(cls, count: int, out_features: int, in_features: int, compute_dtype=torch.float32,
              device=None) -> "Stack8bit":  # fmt: skip
        """Uninitialised; every expert is to be `put`."""
        weight = torch.empty((count, out_features, in_features), dtype=torch.int8, device=device)
        return cls(weight, torch.empty((count, out_features), dtype=torch.float32, device=device), compute_dtype)

    @property
    def stored_bytes(self) -> int:
        return _stored_bytes(self)

    def put(self, e: int, weight: torch.Tensor):
        """Quantize and store expert e, which ends any loan. weight: (out, in), a float dtype, on any device. Raises
        CheckpointError for another shape, UserError for what 8 bits cannot hold."""
        _check_matrix(self, weight)
        packed, scale = quantize_8bit(weight)
        self.weight[e].copy_(packed)
        self.SCB[e].copy_(scale)

    def expert(self, e: int, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W (out, in) of expert e in `dtype` (default: compute_dtype), on loan as `dequantized_weight` lends: the next
        call overwrites it. Or in `out`, whose dtype decides. Carries no gradient."""
        out = _loan(self, dtype) if out is None else out
        return Linear8bit(self.weight[e], self.SCB[e]).dequantized(out=out)

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtypes(self, fn), recurse)


class StackMxfp4(nn.Module):
    """E matrices in MXFP4, as the checkpoint stores them: `blocks` uint8 (E, out, in/32, 16), `scales` uint8
    (E, out, in/32), which `.to()` and `.half()` leave. Raises CheckpointError where they do not fit together."""

    dequantize = staticmethod(dequantize_mxfp4)
    matmul = None

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor, compute_dtype=torch.float32):
        super().__init__()
        check_packed(blocks, scales)
        _set_shape(self, (*scales.shape[:-1], scales.shape[-1] * BLOCK), compute_dtype)
        self.register_buffer("blocks", blocks)
        self.register_buffer("scales", scales)

    @classmethod
    def empty(cls, count: int, out_features: int, in_features: int, compute_dtype=torch.float32,
              device=None) -> "StackMxfp4":  # fmt: skip
        """Uninitialised; every expert is to be put. Raises CheckpointError where rows are not made of whole blocks."""
        if in_features % BLOCK:
            raise CheckpointError(
                f"in_features: {in_features} must be a multiple of {BLOCK}, the block of MXFP4; the config is wrong, "
                "or the checkpoint of another format"
            )
        scales = torch.empty((count, out_features, in_features // BLOCK), dtype=torch.uint8, device=device)
        blocks = torch.empty((*scales.shape, BLOCK // 2), dtype=torch.uint8, device=device)
        return cls(blocks, scales, compute_dtype)

    @property
    def stored_bytes(self) -> int:
        return _stored_bytes(self)

    def put_packed(self, e: int, blocks: torch.Tensor, scales: torch.Tensor):
        """Store expert e. blocks: uint8 (out, in/32, 16); scales: uint8 (out, in/32), on any device. Raises
        CheckpointError for other shapes or dtypes, and for a scale that is NaN."""
        check_packed(blocks, scales)
        if scales.shape != self.scales.shape[1:]:
            raise CheckpointError(
                f"scales: {list(scales.shape)} must be {list(self.scales.shape[1:])}, one of each {BLOCK} weights of "
                "an expert; the checkpoint is of another shape than its config says"
            )
        if scales.numel() and int(scales.max()) == NAN_SCALE:
            raise CheckpointError(f"scales: hold {NAN_SCALE}, which is NaN; the checkpoint is damaged, fetch it again")
        self.blocks[e].copy_(blocks)
        self.scales[e].copy_(scales)

    def expert(self, e: int, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W (out, in) of expert e in `dtype` (default: compute_dtype), on loan as `dequantized_weight` lends: the next
        call overwrites it. Or in `out`, contiguous, whose dtype decides. Carries no gradient."""
        out = _loan(self, dtype) if out is None else out
        return self.dequantize(*self.stored(e), out=out)

    def stored(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.blocks[e], self.scales[e]


Stack = Stack4bit | Stack8bit | StackMxfp4


def expert_weight(stack: torch.Tensor | Stack, e: int, dtype: torch.dtype) -> torch.Tensor:
    """W (out, in) of expert e in `dtype`: of a dense (E, out, in) tensor, differentiable, or on loan from a stack."""
    return stack[e].to(dtype) if isinstance(stack, torch.Tensor) else stack.expert(e, dtype)


def expert_product(x: torch.Tensor, stack: torch.Tensor | Stack, e: int, out: torch.Tensor):
    """x W_eᵀ into out. x (m, in) in the dtype of the product, out (m, out). Nothing is kept for autograd."""
    if isinstance(stack, torch.Tensor) or not stack.matmul:
        torch.mm(x, expert_weight(stack, e, x.dtype).t(), out=out)
    else:
        out.copy_(stack.matmul(x, *stack.stored(e)))


def use_kernels(model: nn.Module, ops: Ops):
    """Have all 4-bit weights of a model, in place, made dense by the first and multiplied by the second of the ops'
    `four_bit` and `mxfp4`, where they have them.

    The first have the signatures and bits of `dequantize_4bit` and `dequantize_mxfp4`. The second give x Wᵀ + bias:
    four_bit's of x, a Quantized4bit and bias or None; mxfp4's of x, blocks and scales."""
    for module in model.modules():
        if ops.four_bit and isinstance(module, Linear4bit | Stack4bit):
            module.dequantize, module.matmul = ops.four_bit
        elif ops.mxfp4 and isinstance(module, StackMxfp4):
            module.dequantize, module.matmul = ops.mxfp4


def deinterleave_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows 0, 2, 4, …, then 1, 3, 5, … along `dim`: gate and up rows as gpt-oss stores them → gate rows first.

    x: any dtype, an even number of rows (else CheckpointError): weights, biases, and MXFP4's blocks and scales alike,
    because a block lies within a row. `interleave_rows` is its inverse."""
    dim %= x.dim()
    return x.unflatten(dim, (_half(x, dim), 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def interleave_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `deinterleave_rows`: the first and second half of the rows along `dim`, in turn. Raises
    CheckpointError for an odd number of rows."""
    dim %= x.dim()
    return x.unflatten(dim, (2, _half(x, dim))).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _half(x: torch.Tensor, dim: int) -> int:
    if x.shape[dim] % 2:
        raise CheckpointError(
            f"gate_up: {x.shape[dim]} rows must be an even number, as many gate rows as up rows; the checkpoint is "
            "damaged, fetch it again"
        )
    return x.shape[dim] // 2


def _set_shape(stack: nn.Module, shape, compute_dtype: torch.dtype):
    stack.shape = torch.Size(shape)
    stack.count, stack.out_features, stack.in_features = stack.shape
    stack.compute_dtype = compute_dtype


def _stored_bytes(stack: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in stack.buffers(recurse=False))


def _loan(stack: Stack, dtype: torch.dtype | None) -> torch.Tensor:
    device = next(stack.buffers()).device
    return _buffer((stack.out_features, stack.in_features), dtype or stack.compute_dtype, device)


def _check_matrix(stack: Stack, weight: torch.Tensor):
    if weight.shape != stack.shape[1:]:
        raise CheckpointError(
            f"weight: {list(weight.shape)} must be {list(stack.shape[1:])}, the (out, in) of one expert; the "
            "checkpoint is of another shape than its config says"
        )
