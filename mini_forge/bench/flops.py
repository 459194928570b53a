"""Floating point operations of a training step, counted by a rule that is said with every share of the matmul peak.

N counts the matrix weights that a token meets (of E experts k, no embedding, no head), M those of them whose products
the backward makes again. A beginning that documents share is computed, and counted, once. A pair is a query with a key
that it may see; every layer's pairs are counted for H heads of width C. Behind its attention the last layer runs only
on the tokens that are trained on, where the model has no experts; it is counted so.

    trained through   (4N + 2M) a token      2N forward, 2N for the gradients of the inputs: the weights are frozen
                      12·H·C a pair          4·H·C forward, twice that backward; 16 where whole layers are made again
                      4·V·D a trained token  logits, and their gradient
    looked at only    2N a token, 4·H·C a pair, 2·V·D a trained token      a pass of the reference, without gradients

Left out, as it is elsewhere: LoRA's own products, norms and other elementwise work, masked scores, and what flash
attention computes twice. So the share is of useful work and a little too low.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mini_forge.config import TrainingConfig
from mini_forge.data.batches import Batch
from mini_forge.data.pairs import PairBatch
from mini_forge.model.decoder import Decoder, DecoderSpec, LayerSpec
from mini_forge.training.preferences import REFERENCE_FREE

RECOMPUTED = {"gate_proj", "up_proj", "gate_up_proj"}  # of an MLP, with recompute "selective"


def step_flops(config: TrainingConfig, spec: DecoderSpec, weights: "Weights", batches: list) -> dict:
    """What the microbatches of one step cost: "matrices", "attention", "head"."""
    N, M = weights.met, weights.met_again
    total = {"matrices": 0.0, "attention": 0.0, "head": 0.0}
    for row, is_trained_through in (each for batch in batches for each in passes(batch, config)):
        scores = 4 * spec.heads * spec.head_size * visible_pairs(spec, row)
        head = 2 * spec.vocab_size * spec.hidden_size * row.trained_tokens
        spared = row.computed_tokens - row.trained_tokens
        for n, m, tokens in ((N, M, row.computed_tokens), (-weights.last, -weights.last_again, spared)):
            total["matrices"] += (4 * n + 2 * m if is_trained_through else 2 * n) * tokens
        total["attention"] += scores * ((4 if M == N else 3) if is_trained_through else 1)
        total["head"] += head * (2 if is_trained_through else 1)
    return total


def passes(batch, config: TrainingConfig) -> list[tuple[Batch, bool]]:
    """The rows that the model is run on for one microbatch, and whether gradients go through."""
    if isinstance(batch, Batch):
        return [(batch, True)]
    if isinstance(batch, PairBatch):
        needs_reference = config.loss_type not in REFERENCE_FREE and batch.reference is None
        return [(batch.row, True), *[(batch.row, False)] * needs_reference]
    mismatched = [] if batch.mismatched is None else [(batch.mismatched, False)] * 2  # KTO: by policy and reference
    return [(batch.row, True), (batch.row, False), *mismatched]


def matrix_weights(spec: DecoderSpec) -> dict[str, float]:
    """The weights a token meets in each matrix by its checkpoint name: of a stack of experts, those of the chosen k."""
    with torch.device("meta"):
        parameters = dict(Decoder(spec).named_parameters())
    of_stacks = {n: p.numel() * spec.experts.top_k / len(p) for n, p in parameters.items() if p.dim() == 3}
    matrices = {n: p.numel() for n, p in parameters.items() if p.dim() == 2 and n.endswith(".weight")}
    outer = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: count for name, count in {**matrices, **of_stacks}.items() if name not in outer}


def parameter_count(spec: DecoderSpec) -> int:
    """All parameters; a head that is the embedding counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(spec).parameters())


@dataclass(frozen=True)
class Weights:
    """N and M as `met` and `met_again`; `last` and `last_again`: those of them that only trained tokens meet."""

    met: float
    met_again: float
    last: float
    last_again: float


def met_weights(config: TrainingConfig, spec: DecoderSpec) -> Weights:
    """Of recompute "selective", M is an MLP's gate and up, and all of an MLP that has experts."""
    weights = matrix_weights(spec)
    experts = tuple(f".layers.{i}.{spec.mlp_name}." for i, layer in enumerate(spec.layers) if layer.experts)

    def is_again(name: str) -> bool:
        if not config.gradient_checkpointing or config.recompute != "selective":
            return config.gradient_checkpointing
        return not RECOMPUTED.isdisjoint(name.split(".")) or any(part in name for part in experts)

    def is_last(name: str) -> bool:
        own = f".layers.{len(spec.layers) - 1}."
        return spec.experts is None and own in name and (".o_proj." in name or f".{spec.mlp_name}." in name)

    def total(chosen: Callable[[str], bool]) -> float:
        return sum(count for name, count in weights.items() if chosen(name))

    return Weights(total(lambda name: True), total(is_again), total(is_last),
                   total(lambda name: is_last(name) and is_again(name)))  # fmt: skip


def visible_pairs(spec: DecoderSpec, row: Batch) -> int:
    """Pairs of query and key that may see each other, over all layers. Positions count from a document's beginning, and
    a query sees all up to its own: within its chunk, no further back than its window."""
    return sum(_pairs(row.position, layer) * count for layer, count in Counter(spec.layers).items())


def _pairs(position: torch.Tensor, layer: LayerSpec) -> int:
    seen = (position if layer.chunk is None else position % layer.chunk) + 1
    return int(seen.clamp(max=layer.window).sum() if layer.window else seen.sum())


def counted_as(config: TrainingConfig, weights: Weights) -> str:
    """The rule of `step_flops` in one sentence, with this run's numbers."""
    N, M = weights.met, weights.met_again
    again = f" and 2·{M:,.0f} of those made again by gradient_checkpointing ({config.recompute})" if M else ""
    through = 16 if M == N else 12
    reference = "; a pass of the reference 2N, 4·H·C and 2·V·D" if config.strategy == "dpo" else ""
    return (
        f"4·N a token trained through, N = {N:,.0f} matrix weights it meets{again}, less {weights.last:,.0f} of the "
        f"last layer where it is not trained on; {through}·H·C for each pair of query and visible key in each layer; "
        f"4·V·D a trained token for the head{reference}; LoRA's own products, norms and other elementwise work are not "
        "counted"
    )
