"""Fused versions of the decoder's functions: same names, signatures and results as `mini_forge.model.functional`.

Each file: the equation and the bytes it moves, the reference, the hand-written forward and backward in plain torch,
which serve every device, the Triton kernels for CUDA tensors, the public function. Which of the two runs is said by
`triton_support.reason_not` of a tensor's device; `missing` tells it before a run.

For float32 on CPUs with AVX-512 there are C++ files, compiled on the user's machine at first use (compiled.py):
rowwise.cpp under norms, units and rotations; attention.cpp; low_rank.cpp, LoRA's products with dropout;
frozen_product.cpp, products with weights as they are stored, and amx_product.cpp for CPUs with a matrix unit.
Each is tested against its reference in value and in all gradients, the Triton kernels without a GPU under Triton's
interpreter, and amx_product.cpp without such a unit with its instructions in plain C++.
"""

import torch

from mini_forge_kernels.triton_support import reason_not

TRITON_OPS = ("rms_norm", "rope_qk", "swiglu", "clamped_swiglu", "token_nll", "grouped_lora", "dequantize_4bit",
              "dequantize_mxfp4")  # fmt: skip


def missing(device: torch.device) -> dict[str, str]:
    """Why an op does not run in Triton for tensors on `device`, op by op; empty where all do."""
    reason = reason_not(device)
    return {} if reason is None else dict.fromkeys(TRITON_OPS, reason)
