"""From host memory to the device on which a model computes."""

import torch


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on `device`; on a GPU without the wait for all that it has been given, with which `x.to(device)` ends.

    Ordinary host memory has been read when this returns (CUDA stages a copy from memory that is not pinned), so x may
    be changed or dropped. Towards the host, and to MPS, the copy is waited for."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda" and x.device.type == "cpu")
