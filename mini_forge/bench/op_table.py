"""Where a step's time goes: the operations of one profiled step, in a dozen groups that a person can read.

Which function an operation belongs to is said by ranges around the functions a decoder is built from (`labelled`). The
gradients of what such a function computed carry the sequence numbers of its operations, by which autograd links the
two. Other operations are told by their names and shapes: a product with the LoRA rank or the vocabulary among its sizes
is LoRA's or the loss head's.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mini_forge.model.ops import Differentiable, Ops
from mini_forge_kernels import frozen_product

OPS = {"rms_norm": "norms", "rope_qk": "rope", "swiglu": "gated unit",
       "clamped_swiglu": "gated unit", "attention": "attention", "token_nll": "loss head",
       "grouped_lora": "LoRA products", "rms_norm_vjp": "norms", "swiglu_vjp": "gated unit"}  # fmt: skip
# Compiled functions, which torch does not see, by the ranges around their calls.
COMPILED = {"attend": "attention", "attend_backward": "attention", "sum_parts": "attention", "rms_norm": "norms",
            "rms_norm_gradient": "norms", "rms_norm_vjp": "norms", "swiglu": "gated unit",
            "swiglu_gradient": "gated unit", "rotate": "rope",
            **dict.fromkeys(("down", "pull_back", "outer", "up"), "LoRA products")}  # fmt: skip
# Methods of modules.
OTHERS = {"unit": "gated unit", "update": "LoRA products", "dequantized": "dequantizing", "expert": "dequantizing"}
MATRIX = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::linear", "aten::matmul",
          "aten::addmv", "aten::mv", "aten::mkldnn_linear")  # fmt: skip
ATTENTION, OPTIMIZER = "scaled_dot_product", ("aten::_foreach", "aten::_fused_adam", "aten::linalg_vector_norm")
BACKWARD = "autograd::engine::evaluate_function"
PREFIX = "mini_forge: "


def labelled(group: str, function: Callable) -> Callable:
    """`function` in a range of the profiler that bears the group's name."""

    @wraps(function)
    def run(*arguments, **options):
        with record_function(PREFIX + group):
            return function(*arguments, **options)

    return run


def label(model: nn.Module, optimizer):
    """Put ranges around the functions that the model's modules call and the optimizer's step, in place. They cost some
    microseconds each."""
    optimizer.step = labelled("optimizer", optimizer.step)
    for module in model.modules():
        if isinstance(getattr(module, "ops", None), Ops):
            there = {name: getattr(module.ops, name) for name in OPS}
            named = {name: labelled(OPS[name], function) for name, function in there.items() if function is not None}
            module.ops = replace(module.ops, **named)
        for name, group in OTHERS.items():
            function = getattr(module, name, None)
            if isinstance(function, Differentiable):
                both = labelled(group, function.function), labelled(group, function.vjp)
                setattr(module, name, Differentiable(*both))
            elif callable(function):
                setattr(module, name, labelled(group, function))


class StepProfile:
    """The operations of what runs between `start` and `stop`, by the time of the CPU or, on CUDA, of the GPU."""

    def __init__(self, device: str):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes two lines of its own to users' error stream
        self.is_cuda = device == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.is_cuda]
        self.profile = profile(activities=activities, record_shapes=True)

    def start(self):
        self.profile.start()

    def stop(self):
        self.profile.stop()

    def table(self, wall_seconds: float, rank: int, vocab_size: int) -> list[dict]:
        """Rows of group, seconds and share of their sum, longest first; of `other operations` also the names of the
        longest. Seconds are of operations themselves, not of what they call. `between operations` is what remains of
        the wall: Python, the profiler itself, and on CUDA a device that waits."""
        seconds, others = Counter(), Counter()
        # Kernels are in the list too, but each also counts as the device's time of the operation that launched it.
        events = [event for event in self.profile.events() if event.device_type == DeviceType.CPU]
        for event, group in _groups(events, rank, vocab_size):
            if event.name.startswith(PREFIX) and not self.is_cuda:
                continue  # Python within a range
            own = (event.self_device_time_total if self.is_cuda else event.self_cpu_time_total) / 1e6
            seconds[group] += own
            if group == "other operations":
                others[event.name.removeprefix("aten::").removeprefix(BACKWARD + ": ")] += own
        seconds["between operations"] = max(0.0, wall_seconds - sum(seconds.values()))
        total = sum(seconds.values())
        rows = [{"group": g, "seconds": s, "share": s / total} for g, s in seconds.most_common() if s > 0]
        for row in rows:
            if row["group"] == "other operations":
                row["longest"] = {name: s / total for name, s in others.most_common(5)}
        return rows


def _groups(events, rank: int, vocab_size: int) -> list[tuple]:
    """(event, its group) for every event of a profile."""
    events = sorted(events, key=lambda event: event.time_range.start)
    labels: dict[tuple[int, int], str | None] = {}  # of the forward operation that made an autograd node
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and event.scope == 0:
            labels[event.thread, event.sequence_nr] = _range(event)  # the last with a number made the node
    return [(event, _group(event, labels, rank, vocab_size)) for event in events]


def _with_callers(event) -> Iterator:
    """The event, what it is called by, what that is called by, …"""
    while event is not None:
        yield event
        event = event.cpu_parent


def _range(event) -> str | None:
    """The group of the innermost range that the event lies in."""
    names = (caller.name for caller in _with_callers(event))
    return next((name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)), None)


def _group(event, labels: dict, rank: int, vocab_size: int) -> str:
    for caller in _with_callers(event):  # the nearest that says what it is for
        name = caller.name
        if name in COMPILED:
            return COMPILED[name]
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX)
        if name.startswith("aten::embedding"):
            return "other operations"
        if ATTENTION in name.lower() or "varlen_attn" in name:
            return "attention"
        if name.startswith(BACKWARD) and labels.get((caller.fwd_thread, caller.sequence_nr)):
            return labels[caller.fwd_thread, caller.sequence_nr]
    if any(caller.name.startswith(OPTIMIZER) for caller in _with_callers(event)):  # clipping; a norm has such too
        return "optimizer"
    sizes = {size for shape in event.input_shapes or () for size in shape if isinstance(size, int)}
    if vocab_size in sizes:
        return "loss head"
    if any(caller.name == frozen_product.NAME for caller in _with_callers(event)):
        return "matrix products"
    if event.name.rstrip("_") in MATRIX:
        return "LoRA products" if rank in sizes else "matrix products"
    return "other operations"
