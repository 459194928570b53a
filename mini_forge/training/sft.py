"""Supervised fine-tuning: next-token loss on the response tokens. QLoRA is the same objective over a 4-bit base."""

import torch

from mini_forge.data.batches import Batch
from mini_forge.model.decoder import Decoder
from mini_forge.model.experts import balance_loss, load_metrics
from mini_forge.model.transfer import to_device
from mini_forge.training.losses import LossSum, Objective, model_nll


def sft_loss(model: Decoder, batch: Batch) -> LossSum:
    """Summed negative log-likelihood, in nats, of the batch's trained-on tokens. The head runs on them alone."""
    rows, targets, _ = batch.trained()
    # A balance loss and the experts' load are of all tokens, so there the last layer computes them all; but of a
    # document's last one, after which nothing is predicted, no layer does (transformers' balance loss counts it).
    wanted = rows if model.spec.experts is None else None
    hidden = model(batch.input_ids, batch.position, batch.document, parents=batch.parents, rows=wanted)
    hidden = hidden if wanted is not None else hidden.flatten(0, 1).index_select(0, to_device(rows, model.device))
    nll = model_nll(model, hidden, targets)
    if not model.routings:
        return LossSum(nll.sum(), nll.numel())
    return _with_balance(model, nll)


def _with_balance(model: Decoder, nll: torch.Tensor) -> LossSum:
    """Experts' load among the metrics and, where the checkpoint's config asks for it, the balance loss, weighted by
    tokens as the rest is: each microbatch counts by its trained tokens."""
    count, coefficient = nll.numel(), model.spec.experts.balance_coef
    metrics = {name: value * count for name, value in load_metrics(model.routings).items()}
    total = nll.sum()
    if coefficient:
        balance = balance_loss(model.routings)
        metrics["balance_loss"] = float(balance.detach()) * count
        total = total + coefficient * balance * count
    return LossSum(total, count, metrics)


SFT = Objective(sft_loss, lambda batch: batch.trained_tokens)
