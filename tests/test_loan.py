"""The one buffer in which quantized weights are made dense: no product makes another, none meets another's weight."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mini_forge.model import fourbit, quant
from mini_forge.model.lora import LoRALinear, LoraSpec, project
from mini_forge.model.quant import Linear4bit, Linear8bit, dequantized_weight


class Sizes(TorchDispatchMode):
    """Bytes of each tensor that is made within and shares no memory with `known` or one made before."""

    def __init__(self, *known):
        super().__init__()
        self.bytes, self.held = [], [t.untyped_storage() for t in known]
        self.seen = {storage.data_ptr() for storage in self.held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                self.held.append(tensor.untyped_storage())  # held, so that no later one gets its address
                self.seen.add(self.held[-1].data_ptr())
                self.bytes.append(self.held[-1].nbytes())
        return result


def adapted(kind, out_features, in_features, seed):
    """A LoRA layer over a 4-bit or 8-bit one, its update not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    base = (
        Linear8bit.from_weight(weight) if kind == "8-bit" else Linear4bit.from_weight(weight, nested=kind == "nested")
    )
    layer = LoRALinear(base, LoraSpec(rank=2, alpha=4.0), generator)
    nn.init.normal_(layer.lora_B, generator=generator)
    return layer


KINDS = ["nf4", "nested", "8-bit"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_product_makes_a_dense_weight_of_its_own(kind):
    """q, k, v of 1,024² weights, 4 MiB each when dense: forward and backward make parts of 1 MiB at most once the
    buffer is there."""
    layers = [adapted(kind, 1024, 1024, seed) for seed in range(3)]
    x = torch.randn(3, 1024, requires_grad=True)
    loan = dequantized_weight(layers[0].base, torch.float32)
    with Sizes(loan, x) as made:
        sum(y.sum() for y in project(x, *layers)).backward()
    assert made.bytes and max(made.bytes) <= 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_than_on_the_cpu_one_dense_weight_is_made_and_no_copy(dtype, monkeypatch):
    """On the meta device, with a decoder that makes a tensor of its own, as bitsandbytes' does."""
    monkeypatch.setitem(fourbit._DECODERS, "torch", lambda packed, absmax, q, dtype: packed.new_empty(
        2 * packed.numel(), dtype=dtype))  # fmt: skip
    layer = Linear4bit.from_weight(torch.randn(64, 1024)).to("meta")
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Count():
        weight = dequantized_weight(layer, dtype)
    assert weight.shape == (64, 1024) and weight.dtype == dtype and weight.is_meta
    assert [name for name in seen if name in ("empty", "new_empty", "empty_like", "copy_", "_to_copy")] == ["new_empty"]


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_one_forward_do_not_meet_in_the_buffer(kind, monkeypatch):
    """Two levels of q, k, v, of growing and shrinking sizes, one of them recomputed in the backward, with a bare layer
    between: bit for bit what they are with memory of their own for every weight."""

    def run():
        quant._LOANED.__dict__.clear()  # so that the buffer grows on the way
        torch.manual_seed(0)
        first = [adapted(kind, width, 33, width) for width in (8, 70, 5)]
        second = [adapted(kind, width, 70, width) for width in (90, 4)]
        between = adapted(kind, 70, 70, 1).base
        x = torch.randn(6, 33, requires_grad=True)

        def block(x):
            q, k, v = project(x, *first)
            y = between(k.tanh()) + project(k.sigmoid(), second[0])[0][:, :70]
            return torch.cat((q, v, *project(y, *second)), dim=1)

        out = checkpoint(block, x, use_reentrant=False) + block(x)
        out.square().sum().backward()
        grads = [p.grad for layer in (*first, *second) for p in (layer.lora_A, layer.lora_B)]
        return [out.detach(), x.grad, *grads]

    shared = run()
    monkeypatch.setattr(quant, "_buffer", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    for a, b in zip(shared, run(), strict=True):
        assert torch.equal(a, b)
