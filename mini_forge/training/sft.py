"""Supervised fine-tuning: next-token loss on the response tokens. QLoRA is the same objective over a 4-bit base."""

from mini_forge.data.batches import Batch
from mini_forge.model.decoder import Decoder
from mini_forge.training.losses import LossSum, Objective, token_nll


def sft_loss(model: Decoder, batch: Batch) -> LossSum:
    """Summed negative log-likelihood, in nats, of the batch's trained-on tokens. The head runs on them alone."""
    hidden = model(batch.input_ids, batch.position, batch.document).flatten(0, 1)
    targets = batch.targets.flatten()
    is_trained = (targets != -100).nonzero().squeeze(-1)
    nll = token_nll(hidden[is_trained], model.head_weight, targets[is_trained])
    return LossSum(nll.sum(), nll.numel())


def trained_tokens(batch: Batch) -> int:
    return int((batch.targets != -100).sum())


SFT = Objective(sft_loss, trained_tokens)
