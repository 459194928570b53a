"""A GPU that is not there: tensors that say they are on `cuda:0`, and are computed on the CPU.

    python cuda_on_cpu.py LIBRARY COMMANDS REPORTS

runs mini_forge's commands on a machine that seems to have a GPU of 80 GiB and compute capability 9.0. LIBRARY is
cuda_on_cpu.cpp, compiled. COMMANDS is a JSON file, a list of the arguments of each; the first that fails ends it.
REPORTS is written: for each command how often it launched each Triton kernel, and where and how often the host waited
for the device.

It shows that the code for CUDA finds its way to the end and gives the numbers that the code for CPUs gives; that every
tensor is on the device on which torch wants it; where the host waits. It does not show that a kernel works on a card
(Triton's run under its interpreter, of torch's and bitsandbytes' the CPU's run), nor anything about speed, memory or
streams: copies are done at once.
"""

# ruff: noqa: E402 -- torch looks for the hooks of a device once, so that they must be there before it

import ctypes
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]

os.environ["TRITON_INTERPRET"] = "1"
_folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0]) / "lib"
for _library in (_folder / "libc10.so", _folder / "libtorch_cpu.so", Path(sys.argv[1])):
    ctypes.CDLL(str(_library), ctypes.RTLD_GLOBAL)

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
in_aten = torch.library.Library("aten", "IMPL")
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
COPIES = (aten.copy_.default, aten._to_copy.default)  # from one device to the other
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# The host waits for a number, or for the size of a result.
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
         aten.unique_consecutive.default, aten.equal.default, aten.repeat_interleave.Tensor,
         aten.bincount.default)  # fmt: skip

waits, launches = Counter(), Counter()
_generators: dict[int, torch.device] = {}  # by address: torch wraps its generators anew


class OnCuda(torch.Tensor):
    """A tensor whose numbers are those of `real`, on the CPU."""

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=CUDA
        )
        made.real_tensor = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return _compute(function, arguments, options or {})

    @property
    def data(self):
        return OnCuda(self.real_tensor)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.real_tensor = other.real_tensor

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index, value):
        super().__setitem__(torch.tensor(index) if isinstance(index, list) else index, value)

    def tolist(self):
        _count_wait()
        return self.real_tensor.tolist()

    def data_ptr(self):
        return self.real_tensor.data_ptr()

    def untyped_storage(self):
        return self.real_tensor.untyped_storage()


class _Everywhere(TorchDispatchMode):
    """For what makes tensors on a device from none."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return _compute(function, arguments, options or {})


class Generator(torch.Generator):
    """A generator of the CPU that counts as one of `device`."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        _generators[made._cdata] = _device_of(device)
        return made

    @property
    def device(self):
        return _generators[self._cdata]

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


def _device_of(device) -> torch.device:
    return CUDA if torch.device(device).type == "cuda" else torch.device(device)


def _real(value):
    return value.real_tensor if isinstance(value, OnCuda) else value


def _compute(function, arguments, options):
    """function, on the CPU; its results count as being where torch would put them. Raises where torch would."""
    leaves = tree_leaves((arguments, options))
    on_cuda = [leaf for leaf in leaves if isinstance(leaf, OnCuda)]
    device = options.get("device")
    target = _device_of(device) if device is not None else CUDA if on_cuda else CPU
    indices = [i for i in arguments[1] if i is not None] if function in INDEXED else []
    if on_cuda and function not in COPIES:
        # An index may lie in host memory; but what it picks from may not, where the index is on the device.
        _refuse_strangers(function, leaves, indices if isinstance(arguments[0], OnCuda) else [])
    for generator in (leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)):
        if (found := _generators.get(generator._cdata, CPU)) != target:
            raise RuntimeError(f"{function}: Expected a {target.type!r} generator, found {found.type!r}")
    if _is_waited_for(function, arguments, options, target, on_cuda, indices):
        _count_wait()
    changes = {"device": CPU} if device is not None and target == CUDA else {}
    changes |= {"pin_memory": False} if options.get("pin_memory") else {}
    arguments, options = tree_map_only(torch.Tensor, _real, (arguments, {**options, **changes}))
    result = function(*arguments, **options)
    if target != CUDA:
        return result
    known = {id(tensor.real_tensor): tensor for tensor in on_cuda}  # what is changed in place stays what it was
    return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else OnCuda(t), result)


def _refuse_strangers(function, leaves, free):
    """Raise where tensors of the CPU, but for those of no dimension and those that are `free`, meet the device's."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.device == CPU]
    strangers = [str(tuple(tensor.shape)) for tensor in tensors if not any(tensor is each for each in free)]
    if strangers:
        raise RuntimeError(
            f"{function}: Expected all tensors to be on the same device; on the CPU: {', '.join(strangers)}"
        )


def _is_waited_for(function, arguments, options, target, on_cuda, indices) -> bool:
    if function is aten.copy_.default:
        return len(on_cuda) == 1 and not (options.get("non_blocking") or any(arguments[2:]))
    if function is aten._to_copy.default:
        return (target == CUDA) != bool(on_cuda) and not options.get("non_blocking")
    by_size = any(not isinstance(i, OnCuda) or i.dtype in (torch.bool, torch.uint8) for i in indices)
    return bool(on_cuda) and (function in WAITS or by_size)


def _count_wait():
    """Count one more wait at the line of ours that makes it."""
    ours = str(ROOT / "mini_forge"), str(ROOT / "kernels")
    frame = next((each for each in reversed(traceback.extract_stack()) if each.filename.startswith(ours)), None)
    waits[f"{Path(frame.filename).name}: {frame.line}" if frame else "elsewhere"] += 1


def _launch(kernel, programs: int, tensor: torch.Tensor, *arguments, **options):
    """In place of `triton_support.launch`: a kernel of Triton's interpreter takes the CPU's tensors."""
    passed = (tensor, *arguments)
    assert not any(isinstance(each, torch.Tensor) and not isinstance(each, OnCuda) for each in passed), kernel
    if programs:
        launches[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"] += 1
        with _disable_current_modes():
            kernel[(programs,)](*map(_real, passed), **options)


def _attention_by_documents(query, key, value, starts, window: int, scale: float):
    """Of each document in the stream its slice, queries and, once per query's head, keys and values (heads, L, C) in
    float32, and the weights (heads, L, L)."""
    assert query.dtype in (torch.bfloat16, torch.float16) and starts.dtype == torch.int32
    assert query.shape[-1] % 8 == 0 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    edges = starts.tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        sees = (distance >= 0) & (distance <= window if window >= 0 else True)
        heads = (x[start:end].float().transpose(0, 1) for x in (query, key, value))
        q, k, v = (x.repeat_interleave(query.shape[1] // len(x), 0) for x in heads)
        yield slice(start, end), q, k, v, (q @ k.mT * scale).masked_fill(~sees, -torch.inf).softmax(-1)


def _flash_forward(query, key, value, starts, starts_k, longest, longest_k, dropout, is_causal, return_debug_mask,
                   *, scale=None, window_size_left=None, window_size_right=None, **others):  # fmt: skip
    """What torch has for CUDA alone: causal attention within documents, (N, H, C)."""
    assert torch.equal(starts, starts_k) and int(starts.diff().max()) == longest == longest_k
    assert window_size_right == dropout == 0
    out, scale = torch.empty_like(query), scale or query.shape[-1] ** -0.5
    for rows, _, _, v, weights in _attention_by_documents(query, key, value, starts, window_size_left, scale):
        out[rows] = (weights @ v).transpose(0, 1).to(out.dtype)
    log_sums, state = torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)
    return out, log_sums, state, torch.zeros((), dtype=torch.uint64), torch.zeros(())


def _flash_backward(grad, query, key, value, out, log_sums, starts, starts_k, longest, longest_k, dropout, is_causal,
                    state, unused, *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    grads, scale = [torch.empty_like(x) for x in (query, key, value)], scale or query.shape[-1] ** -0.5
    for rows, q, k, v, weights in _attention_by_documents(query, key, value, starts, window_size_left, scale):
        grad_out = grad[rows].float().transpose(0, 1)
        pulled = grad_out @ v.mT
        scores = weights * (pulled - (weights * pulled).sum(-1, keepdim=True)) * scale
        for whole, part in zip(grads, (scores @ k, scores.mT @ q, weights.mT @ grad_out), strict=True):
            whole[rows] = part.unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1).to(whole.dtype)
    return tuple(grads)


_tensor_in_torch = torch.tensor


def _tensor(data, device=None, **options):
    """`torch.tensor`, which makes its tensor without telling a mode."""
    if device is None or _device_of(device) != CUDA:
        return _tensor_in_torch(data, device=device, **options)
    _count_wait()  # it is made in host memory, and copied
    return OnCuda(_tensor_in_torch(data, **options))


@contextmanager
def _nothing(*arguments):
    yield


class _Stream:
    def __init__(self, *arguments):
        pass

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self):
        return self


def pretend():
    """From here on there is a GPU. `torch.cuda` answers what mini_forge asks it."""
    device = SimpleNamespace(total_memory=80 * 2**30, multi_processor_count=132, name="none")
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_capability": (9, 0), "get_device_name": "none", "get_device_properties": device,
        "is_bf16_supported": True, "synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 1,
        "get_rng_state_all": [], "set_rng_state_all": None, "get_rng_state": torch.empty(0), "set_rng_state": None,
        "current_stream": _Stream(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, answer=answer, **options: answer)
    torch.cuda.Stream = _Stream
    torch.cuda.device = torch.cuda.device_of = torch.cuda.stream = _nothing
    torch.Generator = Generator
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.to()` cannot change a parameter's kind in place
    torch.tensor = _tensor
    in_aten.impl("_flash_attention_forward", _flash_forward, "CPU")
    in_aten.impl("_flash_attention_backward", _flash_backward, "CPU")
    from mini_forge_kernels import triton_support

    triton_support.launch = _launch  # before the kernels take it from there
    _Everywhere().__enter__()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import bitsandbytes  # noqa: F401 -- as long as there is no GPU: it would look for its CUDA library

    pretend()
    from mini_forge.cli import main

    reports = []
    for command in json.loads(Path(sys.argv[2]).read_text()):
        launches.clear(), waits.clear()
        if code := main(command):
            sys.exit(code)
        reports.append({"launches": dict(launches), "waits": dict(waits)})
    Path(sys.argv[3]).write_text(json.dumps(reports))
