"""Fused versions of the decoder's functions: same names, signatures and results as `mini_forge.model.functional`.

Each file: the equation and the bytes it moves, the reference, the hand-written forward and backward in plain torch,
which serve the CPU and the Mac, the Triton kernels for CUDA tensors, the public function; attention.py and
bfloat16_product.py are for the CPU alone. Which of the two runs is said by `triton_support.reason_not` of a tensor's
device; `missing` tells it before a run. Each is tested against its reference in value and in all gradients, the Triton
kernels without a GPU under Triton's interpreter.
"""

import torch

from mini_forge_kernels.triton_support import reason_not

TRITON_OPS = ("rms_norm", "rope_qk", "swiglu", "clamped_swiglu", "token_nll", "grouped_lora", "dequantize_4bit",
              "dequantize_mxfp4")  # fmt: skip


def missing(device: torch.device) -> dict[str, str]:
    """Why an op does not run in Triton for tensors on `device`, op by op; empty where all do."""
    reason = reason_not(device)
    return {} if reason is None else dict.fromkeys(TRITON_OPS, reason)
