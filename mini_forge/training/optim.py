"""Optimizers by name, their state as plain tensors, and gradient clipping.

All the AdamW here are Loshchilov & Hutter (1711.05101) Alg. 2, with m and v the running means of g and g²:

    p ← p·(1 − lr·wd),   p ← p − lr · m/(1 − β1ᵗ) / (√(v/(1 − β2ᵗ)) + ε)        β = (0.9, 0.999), ε = 1e-8

8-bit ones (2110.02861) keep m and v in 8 bits with a scale for each 256 values, but for tensors below 4096 values.
bitsandbytes is imported only when one of its optimizers is made.
"""

import logging
from collections.abc import Iterable

import torch

from mini_forge.errors import CheckpointError, ConfigError

BETAS, EPS = (0.9, 0.999), 1e-8
BITSANDBYTES_DEVICES = ("cpu", "cuda")
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")  # of a group; the others describe how a device computes
DERIVED_STATE = ("qmap1", "qmap2")  # constants of the 8-bit code: 2 KiB a tensor that a new optimizer makes by itself


class AdamW:
    """torch.optim.AdamW(fused=True) without torch.optim: the same kernel and, bit for bit, the same numbers.

    Making any torch.optim.Optimizer imports torch's compiler, 1.3 s of every start; nothing else here needs it. What
    is used of an optimizer is here: param_groups, state, step, zero_grad."""

    def __init__(self, params: Iterable, lr: float, weight_decay: float):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        defaults = {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
        self.param_groups = [defaults | group for group in groups]
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}

    def init_state(self, group: dict, parameter: torch.nn.Parameter, group_index: int = 0, index: int = 0):
        """The state of a parameter before its first step. The arguments are those of bitsandbytes' optimizers."""
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.init_state(group, p)
            if not params:
                continue
            m, v, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params, [p.grad for p in params], m, v, [], steps, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=False,
            )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True):
        grads = [p.grad for p in _parameters(self) if p.grad is not None]
        if set_to_none:
            for p in _parameters(self):
                p.grad = None
        elif grads:
            torch._foreach_zero_(grads)


Optimizer = AdamW | torch.optim.Optimizer


def make_optimizer(
    name: str, params: Iterable, lr: float, weight_decay: float, device: torch.device | str
) -> Optimizer:
    """The optimizer `name`, a key of OPTIMIZERS, over parameters or parameter groups that lie on `device`.

    weight_decay is for parameters of groups that do not say (see `parameter_groups`). Paged states need a GPU to page
    from; elsewhere a paged optimizer is its plain counterpart, as the run's first lines say. Raises ConfigError
    for an unknown name, or 8-bit states where no kernel has them."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim: {name!r} is not known; use one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](params, lr, weight_decay, torch.device(device).type)


def adamw_torch(params, lr, weight_decay, device):
    return AdamW(params, lr, weight_decay)


def adamw_8bit(params, lr, weight_decay, device):
    return _bitsandbytes(device).AdamW8bit(params, lr, BETAS, EPS, weight_decay)


def paged_adamw_32bit(params, lr, weight_decay, device):
    if device != "cuda":
        return adamw_torch(params, lr, weight_decay, device)
    return _bitsandbytes(device).PagedAdamW32bit(params, lr, BETAS, EPS, weight_decay)


def paged_adamw_8bit(params, lr, weight_decay, device):
    if device != "cuda":
        return adamw_8bit(params, lr, weight_decay, device)
    return _bitsandbytes(device).PagedAdamW8bit(params, lr, BETAS, EPS, weight_decay)


def sgd(params, lr, weight_decay, device):
    """Without momentum: p ← p − lr·(g + wd·p). No state at all."""
    return torch.optim.SGD(params, lr, weight_decay=weight_decay)


OPTIMIZERS = {
    "adamw_torch": adamw_torch,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_32bit": paged_adamw_32bit,
    "paged_adamw_8bit": paged_adamw_8bit,
    "sgd": sgd,
}


def _bitsandbytes(device: str):
    if device not in BITSANDBYTES_DEVICES:
        raise ConfigError(f"optim: 8-bit states need cpu or cuda, not {device}; use adamw_torch")
    # Said on import about a fused inference kernel that is not used here, on the error stream that users read.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.optim
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError as error:
        raise ConfigError(f"optim: bitsandbytes cannot be imported ({error}); use adamw_torch") from None
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise ConfigError("optim: bitsandbytes has no native library for this machine; use adamw_torch")
    return bitsandbytes.optim


def parameter_groups(named_params: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict]:
    """Trainable parameters in one group with decay and one without: biases and norm weights are not decayed.

    Norm weights are vectors, so a vector is never decayed; nor is anything whose name ends in `bias`."""
    decayed, plain = [], []
    for name, parameter in named_params:
        if parameter.requires_grad:
            (plain if parameter.dim() < 2 or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def clip_grad_norm(params: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), in place, where `norm` is their joint L2 norm.

    Returns the norm before clipping, float32 (); NaN or infinity if a gradient has one, for the caller to judge.
    max_norm 0: nothing is clipped. Summed in float32: a float16 norm ends at 65504."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        # Multiplied even by 1: to ask whether it is 1 would make the host wait for the GPU.
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimizer_state(optimizer: Optimizer) -> dict:
    """A copy of all state on the CPU, as tensors, numbers, lists and dicts: torch.load(weights_only=True) reads it.

    {"kind": class name, "groups": [hyperparameters], "state": [one dict a parameter, in order; {} before its first
    step]}. Paged states are copied out of their pages."""
    if next(iter(_parameters(optimizer))).device.type == "cuda":
        torch.cuda.synchronize()  # pages are read from the host, past the stream that writes them
    return {
        "kind": _kind(optimizer),
        "groups": [{k: g[k] for k in HYPERPARAMETERS if k in g} for g in optimizer.param_groups],
        "state": [_copied(optimizer.state.get(p, {})) for p in _parameters(optimizer)],
    }


@torch.no_grad()
def load_optimizer_state(optimizer: Optimizer, state: dict):
    """Put back what `optimizer_state` gave, bit for bit, into a new optimizer over the same parameters.

    Raises CheckpointError, before anything is changed, where the state is of another kind or another set of shapes."""
    _check(optimizer, state)
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    # Into buffers that the optimizer makes itself: paged ones are paged again, which bitsandbytes' own loader is not.
    index = iter(state["state"])
    for group_index, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            values = next(index)
            optimizer.state.pop(parameter, None)
            if not values:
                continue
            optimizer.init_state(group, parameter, group_index, i)
            if parameter.device.type == "cuda":
                torch.cuda.synchronize()  # pages are zeroed on the stream, filled from the host
            state = optimizer.state[parameter]
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value


def _check(optimizer: Optimizer, state: dict):
    kind, parameters = _kind(optimizer), list(_parameters(optimizer))
    if state["kind"] != kind:
        raise CheckpointError(f"optim: the checkpoint is of {state['kind']}, this run of {kind}; keep optim as it was")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if len(state["groups"]) != len(sizes) or len(state["state"]) != len(parameters):
        raise CheckpointError(
            f"optim: the checkpoint has {len(state['state'])} parameters in {len(state['groups'])} groups, this run "
            f"{len(parameters)} in {len(sizes)}; resume with the model, adapter and weight_decay it was saved with"
        )
    for i, (parameter, values) in enumerate(zip(parameters, state["state"], strict=True)):
        for key in ("exp_avg", "state1"):
            if key in values and values[key].shape != parameter.shape:
                raise CheckpointError(
                    f"optim: {key} of parameter {i} has shape {list(values[key].shape)}, the parameter "
                    f"{list(parameter.shape)}; resume with the adapter settings it was saved with"
                )


def _copied(values: dict) -> dict:
    return {
        k: v.detach().to("cpu", copy=True) if isinstance(v, torch.Tensor) else v
        for k, v in values.items()
        if k not in DERIVED_STATE
    }


def _kind(optimizer: Optimizer) -> str:
    """The class but for paging: paged and plain states are the same numbers, so a run may go on without a GPU."""
    return type(optimizer).__name__.removeprefix("Paged")


def _parameters(optimizer: Optimizer) -> Iterable[torch.nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
