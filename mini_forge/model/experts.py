"""Mixture of experts: a router picks k of E SwiGLU MLPs for each token. 1701.06538 Eq. 1 and 3-5, 2401.04088 §2.1.

Tokens are sorted by expert, so each expert multiplies one block of rows; only experts that have rows are touched. The
weights are stacks: `gate_up_proj` (E, 2F, D), gate rows first, and `down_proj` (E, D, F), dense or quantized
(`mini_forge.model.stacks`); of a quantized stack one expert at a time is made dense.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mini_forge.model.grouped import grouped_products
from mini_forge.model.lora import LoRAStack
from mini_forge.model.ops import Ops, gated_unit
from mini_forge.model.spec import DecoderSpec


@dataclass(frozen=True)
class Routing:
    """Where the N tokens of a layer went: to each expert how many, (E,) int64, and the sum of their probabilities of
    it, (E,) float32 with gradient, where the balance loss is wanted."""

    tokens: int
    chosen: torch.Tensor
    probability: torch.Tensor | None


def balance_loss(routings: list[Routing]) -> torch.Tensor:
    """E · Σ_e f_e P_e over the tokens of all layers: f_e expert e's share of them, P_e its mean probability. Switch
    (2101.03961) Eq. 4-6. k when all experts are equally busy (k chosen of each token); a scalar with gradient."""
    tokens = sum(r.tokens for r in routings)
    shares = sum(r.chosen for r in routings) / tokens
    probabilities = sum(r.probability for r in routings) / tokens
    return len(shares) * (shares * probabilities).sum()


def load_metrics(routings: list[Routing]) -> dict[str, float]:
    """Means over layers: `expert_load_max`, the busiest expert's tokens over the mean (1 is balance), and
    `experts_unused`, the share of experts without a token."""
    chosen = torch.stack([r.chosen for r in routings]).float()
    return {
        "expert_load_max": float((chosen.amax(1) / chosen.mean(1)).mean()),
        "experts_unused": float((chosen == 0).float().mean()),
    }


class Router(nn.Module):
    """Logits (N, E) of each token's experts. Its own kind of module: never quantized, never adapted by "all-linear"."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.experts.count, spec.hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.experts.count)) if spec.experts.router_bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """The stacks. Input rows lie sorted by expert: `counts[e]` rows of expert e."""

    def __init__(self, spec: DecoderSpec, ops: Ops):
        super().__init__()
        E, D, W = spec.experts.count, spec.hidden_size, spec.experts.size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * W, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, W))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * W)) if spec.experts.bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(E, D)) if spec.experts.bias else None
        self.unit = gated_unit(ops, spec.activation, spec.clamp)

    def forward(self, x, counts: list[int]):
        """(M, D) → (M, D)."""
        gate, up = _products(x, self.gate_up_proj, self.gate_up_proj_bias, counts).chunk(2, dim=-1)
        return _products(self.unit(gate, up), self.down_proj, self.down_proj_bias, counts)


def _products(x, stack, bias, counts):
    return stack(x, bias, counts) if isinstance(stack, LoRAStack) else grouped_products(x, stack, bias, counts)


class MixtureOfExperts(nn.Module):
    """Router, experts and, where there is one, the MLP that every token passes (`shared`)."""

    def __init__(self, spec: DecoderSpec, ops: Ops, shared: nn.Module | None):
        super().__init__()
        self.top_k, self.scoring, self.normalized = spec.experts.top_k, spec.experts.router, spec.experts.normalized
        self.router_name, self.wants_balance = spec.experts.router_name, spec.experts.balance_coef > 0
        self.add_module(self.router_name, Router(spec))
        self.experts = Experts(spec, ops)
        self.shared_expert = shared

    def forward(self, x, routings: "list[Routing] | None" = None):
        """x (N, D) → (N, D); appends to `routings` where the tokens went."""
        N, D = x.shape
        logits = self.get_submodule(self.router_name)(x)
        scores, chosen = self._route(logits)
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        tokens = chosen.flatten().bincount(minlength=logits.shape[-1])
        counts = tokens.tolist()
        if routings is not None:
            routings.append(Routing(N, tokens, logits.float().softmax(-1).sum(0) if self.wants_balance else None))
        rows = x[:, None].expand(N, self.top_k, D)
        if self.scoring == "sigmoid":
            rows = rows * scores[..., None]
        out = self.experts(_PermuteRows.apply(rows.reshape(-1, D), order, inverse), counts)
        out = _PermuteRows.apply(out, inverse, order).view(N, self.top_k, D)
        mixed = out.sum(1) if self.scoring == "sigmoid" else (out * scores[..., None]).sum(1)
        return mixed if self.shared_expert is None else mixed + self.shared_expert(x)

    def _route(self, logits):
        """Scores (N, k) in the logits' dtype and indices (N, k) of each token's experts. Softmax in float32: in 16
        bits the small ones of 128 probabilities are lost."""
        if self.scoring == "sigmoid":
            top, chosen = logits.topk(self.top_k, dim=-1)
            return top.float().sigmoid().to(logits.dtype), chosen
        scores, chosen = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.normalized:
            scores = scores / scores.sum(-1, keepdim=True)
        return scores.to(logits.dtype), chosen


class _PermuteRows(torch.autograd.Function):
    """rows[order]. Its gradient is a permutation too; that of plain indexing would add row by row."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
