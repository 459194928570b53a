"""Checkpoints in host memory: what a block's backward starts from waits in pinned memory instead of on the GPU.

With recompute "full" the device keeps the residual stream (N, D) before each of L blocks. Here it keeps two of them at
any time, and the host L. Copies run on a stream of their own beside the blocks: away while the block that reads the
tensor computes, back while the block behind it goes through its backward (double buffering). Checkpoints: 1604.06174
§4. On a GPU not measured: the tests run the same steps with a CPU's tensors, and with copies as late as may be.

The rule about streams: whatever a copy reads or writes on the device is memory of the computing stream, and is held
here until that stream has been told to wait for the copy. Then its memory is free in the order of that stream, and no
sooner. The allocator's own way (`Tensor.record_stream`) is right too, but gives memory back only once the host has seen
the copy end, and the host runs many blocks ahead: all L tensors would still be on the device.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint


@dataclass(eq=False)
class HostCopy:
    """A tensor's copy in host memory, pinned if the tensor was on a GPU. before: gives the copy made before it, which a
    backward wants next, or None if that is gone."""

    host: torch.Tensor
    device: torch.device
    before: Callable[[], "HostCopy | None"]


@dataclass
class _Transfer:
    """A copy on its way. near: the tensor on the device. wait: makes the computing stream wait until it has ended."""

    copy: HostCopy
    near: torch.Tensor
    wait: Callable[[], None]


def _no_copy() -> None:
    """In place of a weak reference, as long as there is nothing to refer to."""


class HostCopies:
    """Puts tensors into host memory in one order and gets them back in the opposite one, one transfer under way.

    Of a CPU's tensors it makes plain copies, at once, in the same steps. Pinned memory is torch's: freed, it is kept
    for the next tensor of up to its size (rounded to a power of two), once the copies that use it have ended."""

    def __init__(self):
        self._side: torch.cuda.Stream | None = None
        self._transfer: _Transfer | None = None
        self._newest: Callable[[], HostCopy | None] = _no_copy

    def put(self, x: torch.Tensor) -> HostCopy:
        """Begin to copy x away; nobody may write into it. x stays on the device until the next put or get."""
        self._settle()
        x = x.detach()
        copy = HostCopy(torch.empty_like(x, device="cpu", pin_memory=x.is_cuda), x.device, self._newest)
        self._newest = weakref.ref(copy)
        self._transfer = _Transfer(copy, x, self._start(x, copy.host, x.device))
        return copy

    def get(self, copy: HostCopy) -> torch.Tensor:
        """The tensor on its device, and begin to fetch the one put before it. Any number of times, in any order."""
        x = self._settle(copy)
        if x is None:  # out of order, as in a second backward: nobody has begun to fetch it
            self._fetch(copy)
            x = self._settle(copy)
        before = copy.before()
        if before is not None:
            self._fetch(before)
        return x

    def _fetch(self, copy: HostCopy):
        x = torch.empty_like(copy.host, device=copy.device)
        self._transfer = _Transfer(copy, x, self._start(copy.host, x, copy.device))

    def _start(self, source: torch.Tensor, target: torch.Tensor, device: torch.device) -> Callable[[], None]:
        """Copy source into target behind what the computing stream has been given so far: by then x is made, and what
        lay before in memory that x takes over has been read. Returns how that stream waits for the copy."""
        if device.type != "cuda":
            target.copy_(source)
            return lambda: None
        self._side = self._side or torch.cuda.Stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        end = self._side.record_event()
        return lambda: torch.cuda.current_stream(device).wait_event(end)

    def _settle(self, wanted: HostCopy | None = None) -> torch.Tensor | None:
        """Wait for the transfer under way. Returns its tensor if it is that of `wanted`."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            return None
        transfer.wait()
        return transfer.near if transfer.copy is wanted else None


def offloaded(copies: HostCopies, block: Callable, x: torch.Tensor, *others) -> torch.Tensor:
    """block(x, *others), computed again in the backward from a copy of x in host memory.

    It is `torch.utils.checkpoint` but for where the copy lies, so all else is as there: the state of the random
    generators (dropout), gradients added up by autograd over microbatches, a first block whose x needs no gradient, and
    tensors that the block hands out by other ways (routings) with their gradients."""
    place = x.data_ptr()  # not x: what a graph's hooks hold stays as long as the graph

    def pack(saved: torch.Tensor) -> HostCopy | torch.Tensor:
        return copies.put(saved) if saved.data_ptr() == place else saved

    def unpack(kept: HostCopy | torch.Tensor) -> torch.Tensor:
        return copies.get(kept) if isinstance(kept, HostCopy) else kept

    # Hooks for what the checkpoint itself saves, its inputs; those for what the block saves lie inside it.
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return checkpoint(block, x, *others, use_reentrant=False)
