"""From a configuration and a machine to a `Plan`: which device, which precision, which storage, and why.

Hardware profiles are here too: what `compute_specs` suggests, and which profile a machine is.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mini_forge.errors import ConfigError

if TYPE_CHECKING:
    from mini_forge.config import TrainingConfig

PROFILES = {
    "low_end": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "max_seq_length": 512,
        "use_4bit": True,
        "bnb_4bit_compute_dtype": "float16",
        "use_nested_quant": False,
    },
    "mid_range": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_seq_length": 1024,
        "use_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "use_nested_quant": True,
    },
    "high_end": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 2048,
        "use_4bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "use_nested_quant": False,
    },
}

GIB = 2**30
LOW_VRAM_BYTES = int(7.2 * GIB)  # an "8 GB" card reports 7.6 to 8.0 GiB, a "6 GB" one at most 6
MID_VRAM_BYTES = int(15.2 * GIB)  # a "16 GB" card reports 15.6 to 16.0 GiB, a T4 14.6
LOW_MEMORY_BYTES = int(15.2 * GIB)


@dataclass(frozen=True)
class Machine:
    """What can be computed with. device: "cpu", "cuda" or "mps". has_bf16: bfloat16 natively, not by emulation.
    memory_bytes: host memory this process may use (None: unknown). vram_bytes: of the first GPU (None: no GPU)."""

    device: str
    has_bf16: bool = False
    memory_bytes: int | None = None
    vram_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run computes with. dtype, compute_dtype: torch dtype names, of the model and of 4-bit products.
    quantization: None, "nf4", "fp4" or "int8". use_scaler: float16 gradients are scaled. notes: why, a line each."""

    device: str
    dtype: str
    quantization: str | None
    nested: bool
    compute_dtype: str
    use_scaler: bool
    notes: list[str]


def detect_machine(device: str = "auto") -> Machine:
    """The machine this runs on, seen as `device`. Raises ConfigError when that device is not there. Imports torch."""
    import torch

    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if device == "auto":
        device = next(name for name, is_available in present.items() if is_available())
    if not present[device]():
        raise ConfigError(_absent(device))
    memory = host_memory_bytes()
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine("cuda", has_bf16, memory, torch.cuda.get_device_properties(0).total_memory)
    return Machine(device, False, memory, memory if device == "mps" else None)


def host_memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its container's if that is less. None where it cannot be known."""
    if not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def profile_of(machine: Machine) -> str:
    """The hardware profile a machine is: by GPU memory, one lower where host memory is small (unknown counts as small).

    Without a GPU, by host memory alone, and never high_end, whose unquantised weights ask for a GPU."""
    has_memory = (machine.memory_bytes or 0) >= LOW_MEMORY_BYTES
    if machine.vram_bytes is None:
        return "mid_range" if has_memory else "low_end"
    if machine.vram_bytes < LOW_VRAM_BYTES:
        return "low_end"
    if machine.vram_bytes < MID_VRAM_BYTES:
        return "mid_range" if has_memory else "low_end"
    return "high_end" if has_memory else "mid_range"


def resolve(config: "TrainingConfig", machine: Machine) -> Plan:
    """What `config` means on `machine`. Pure. Raises ConfigError when the device asked for is absent, or has no memory
    of its own from which to offload."""
    if config.device not in ("auto", machine.device):
        raise ConfigError(_absent(config.device))
    if config.gradient_checkpointing and config.recompute == "offload" and machine.device != "cuda":
        raise ConfigError(
            f'recompute: "offload" needs device "cuda" (this run is on {machine.device}, in host memory); '
            'give "full", which keeps the same tensors'
        )
    dtype, precision_note = _precision(config, machine)
    notes = [precision_note]
    quantization = config.bnb_4bit_quant_type if config.use_4bit else "int8" if config.use_8bit else None
    compute_dtype = dtype
    if config.use_4bit:
        compute_dtype, note = _compute_dtype(config, dtype)
        notes += [note] if note else []
    if config.optim.startswith("paged") and machine.device != "cuda":
        notes.append(f"{config.optim}: this device ({machine.device}) has no paged memory, the states are plain")
    if config.packing and config.group_by_length:
        notes.append("group_by_length: no effect with packing, whose bins are equally full")
    nested = config.use_4bit and config.use_nested_quant
    return Plan(machine.device, dtype, quantization, nested, compute_dtype, dtype == "float16", notes)


def _precision(config, machine) -> tuple[str, str]:
    """(dtype, note): what was asked for, or the fastest the device computes natively with the range to train in."""
    device = machine.device
    asker = "dtype" if config.dtype else "bf16" if config.bf16 else "fp16"
    if config.bf16:
        emulated = device == "cuda" and not machine.has_bf16
        slow = "; this GPU only emulates it, slowly; float16 would be faster" if emulated else ""
        return "bfloat16", f"precision: bfloat16, as {asker} asks{slow}"
    if config.fp16:
        return "float16", f"precision: float16 with a gradient scaler, as {asker} asks"
    if config.dtype == "float32":
        return "float32", "precision: float32, as dtype asks"
    if device == "cuda" and machine.has_bf16:
        return "bfloat16", "precision: bfloat16, because this GPU computes it natively"
    if device == "cuda":
        return "float16", "precision: float16 with a gradient scaler, because this GPU lacks native bfloat16"
    return "float32", f"precision: float32, because the device is {device}; bf16 or fp16 asks for less"


def _compute_dtype(config, dtype: str) -> tuple[str, str | None]:
    """(dtype of 4-bit products, note): the training dtype, unless the user asks for another than the profile suggests.

    A value equal to the profile's is no demand: a resolved configuration, read again, must mean what it meant."""
    asked, suggested = config.bnb_4bit_compute_dtype, PROFILES[config.compute_specs]["bnb_4bit_compute_dtype"]
    if asked == dtype:
        return dtype, None
    if asked == suggested:
        return dtype, (
            f"bnb_4bit_compute_dtype: {dtype}, the training dtype; {asked} is only what profile "
            f"{config.compute_specs} suggests"
        )
    return asked, (
        f"bnb_4bit_compute_dtype: warning: {asked} as asked, but training is in {dtype}: every 4-bit product is "
        "converted both ways; leave the key out to follow the training dtype"
    )


def _absent(device: str) -> str:
    return f'device: {device!r} is not available on this machine; use "auto" or "cpu"'
