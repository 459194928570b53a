"""Providers: which functions the decoder calls.

`huggingface` is the plain reference path. `unsloth` is the fused path: hand-written gradients, in Triton for CUDA
tensors, in C++ for float32 on the CPU, and else in torch. `missing` says, op by op, what is not so and why. What is in
use is printed when a run starts; nothing is swapped in silence.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mini_forge.model.ops import PLAIN, Ops
from mini_forge.training import losses
from mini_forge_kernels import (
    TRITON_OPS,
    amx_product,
    attention,
    frozen_product,
    linear_cross_entropy,
    low_rank,
    rowwise,
)
from mini_forge_kernels import missing as missing_in_triton
from mini_forge_kernels.dequantize import dequantize_4bit, dequantize_mxfp4, matmul_4bit, matmul_mxfp4
from mini_forge_kernels.grouped_lora import grouped_lora
from mini_forge_kernels.rms_norm import rms_norm, rms_norm_vjp
from mini_forge_kernels.rope import rope_qk
from mini_forge_kernels.swiglu import clamped_swiglu, swiglu, swiglu_vjp
from mini_forge_kernels.triton_support import reason_not


def token_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`losses.token_nll`, whose chunks of logits are torch's, or the same in Triton where that runs."""
    if hidden.dtype != weight.dtype and weight.device.type == "cpu":
        return losses.token_nll(hidden, weight, targets, frozen_product.IN_CPP)
    weight = weight.to(hidden.dtype)
    in_torch = reason_not(hidden.device) is not None
    return (losses if in_torch else linear_cross_entropy).token_nll(hidden, weight, targets)


FUSED = {
    "rms_norm": rms_norm,
    "rope_qk": rope_qk,
    "swiglu": swiglu,
    "clamped_swiglu": clamped_swiglu,
    "attention": attention.attention,
    "token_nll": token_nll,
    "grouped_lora": grouped_lora,
    "low_rank": low_rank.IN_CPP,
}
VJPS = {"rms_norm_vjp": rms_norm_vjp, "swiglu_vjp": swiglu_vjp}
STORED = ("dequantize_4bit", "dequantize_mxfp4")  # of `four_bit` and `mxfp4`
COMPILED = {  # for float32 on the CPU, each with the reason why not
    **dict.fromkeys(("rms_norm", "rope_qk", "swiglu", "clamped_swiglu"), rowwise.reason_not),
    "attention": attention.reason_not_compiled,
    "low_rank": low_rank.reason_not,
}
UNFUSED = {"gelu_glu": "no fused form"}


@dataclass(frozen=True)
class Provider:
    """The ops a model is built with; what each runs in on the device, "triton", "c++", "torch" or "plain"; and a
    reason for each op that is not fused, or not in the fastest form it has."""

    ops: Ops
    backends: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One line: "ops: fused; triton: rms_norm, swiglu; plain: attention (why)"."""
        parts = [f"ops: {self.ops.name}"]
        groups: dict[tuple[str, str | None], list[str]] = {}
        for op in (*self.backends, *(op for op in self.missing if op not in self.backends)):
            groups.setdefault((self.backends.get(op, "plain"), self.missing.get(op)), []).append(op)
        for (backend, why), ops in groups.items():
            parts.append(f"{backend}: {', '.join(ops)}" + (f" ({why})" if why else ""))
        return "; ".join(parts)


def plain(device: torch.device | str | None = None) -> Provider:
    return Provider(PLAIN)


def fused(device: torch.device | str | None = None) -> Provider:
    """LoRA products and the loss head have hand-written gradients everywhere; this adds what lies between.

    `device` (default: a GPU where there is one) is what the reasons speak of, and for which it is decided whether
    matrices stay in bfloat16; else the ops serve every device."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    missing = missing_in_triton(device) | UNFUSED
    backends = {op: "triton" if op in TRITON_OPS and op not in missing else "torch" for op in (*FUSED, *STORED)}
    stored_products = None
    if device.type == "cpu":
        compile_all()
        for op, reason_not_compiled in COMPILED.items():
            reason = reason_not_compiled()
            backends[op] = "torch" if reason else "c++"
            missing = {name: why for name, why in missing.items() if name != op} | ({op: reason} if reason else {})
        if reason := frozen_product.reason_not(device):
            missing[frozen_product.NAME] = reason
        else:
            backends[frozen_product.NAME], stored_products = "c++", frozen_product.IN_CPP
            missing |= {frozen_product.NAME: reason} if (reason := amx_product.reason_not()) else {}
    else:
        backends["attention"], missing["attention"] = "plain", "torch's own kernels are used"
    ops = replace(PLAIN, name="fused", **FUSED, **VJPS, stored_products=stored_products)
    if backends["dequantize_4bit"] == "triton":
        ops = replace(ops, four_bit=(dequantize_4bit, matmul_4bit), mxfp4=(dequantize_mxfp4, matmul_mxfp4))
    return Provider(ops, backends, missing)


def compile_all():
    """Have a machine's first run compile the files side by side; later ones find them."""
    files = {*COMPILED.values(), amx_product.reason_not, partial(frozen_product.reason_not, torch.device("cpu"))}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda reason_not: reason_not(), files))


PROVIDERS = {"huggingface": plain, "unsloth": fused}
