"""Preference tuning without a reward model: DPO (2305.18290) and the losses that grew from it, in `preferences.py`.

The reference is the same weights with the adapters off, or with the run's first adapter on, so it costs a forward pass
and no memory but that adapter's. Both passes run without dropout (the run builds its LoRA layers with rate 0): at a
fresh adapter all rewards are 0 and the sigmoid loss is ln 2. That is bit for bit where both passes make the same
products. They do not where `recompute: "selective"` cuts more than 1,024 tokens into tiles for the pass with gradients,
or where memory is aligned otherwise: there it is to rounding. The head runs in chunks and on response tokens alone.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mini_forge.data.batches import Batch
from mini_forge.data.pairs import PairBatch, PairDocument, collate_pairs
from mini_forge.durable import write_atomic
from mini_forge.model.decoder import Decoder
from mini_forge.model.transfer import to_device
from mini_forge.training.adapters_swap import as_reference
from mini_forge.training.losses import LossSum, Objective, model_nll
from mini_forge.training.preferences import LOSSES, REFERENCE_FREE, LossOptions, Scores, implicit_rewards


def response_logps(model: Decoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(response | prompt) of each of the batch's documents, in nats, and the tokens it is a sum of.

    Both (documents,) float32; the sum differentiable in the model's trained parameters. Summed in float32: a few
    hundred terms in 16 bits would lose the difference between two responses."""
    rows, targets, owner = batch.trained()
    hidden = model(batch.input_ids, batch.position, batch.document, parents=batch.parents, rows=rows)
    nll = model_nll(model, hidden, targets)
    zeros, owner = nll.new_zeros(batch.documents), to_device(owner, model.device)
    return zeros.index_add(0, owner, -nll), zeros.index_add(0, owner, torch.ones_like(nll))


@torch.no_grad()
def reference_logps(model: Decoder, batch: Batch) -> torch.Tensor:
    """(documents,) float32: log π_ref of each document's response, in nats."""
    with as_reference(model):
        return response_logps(model, batch)[0]


def score_pairs(model: Decoder, batch: PairBatch, needs_reference: bool = True) -> Scores:
    """What the model and its reference say of the batch's pairs."""
    reference = (None, None)
    if needs_reference:  # first: its memory is free again before the policy keeps activations
        known = reference_logps(model, batch.row).view(-1, 2) if batch.reference is None else batch.reference
        reference = to_device(known, model.device).unbind(1)
    logps, tokens = response_logps(model, batch.row)
    return Scores(*logps.view(-1, 2).unbind(1), *reference, *tokens.view(-1, 2).unbind(1))


def preference_objective(loss_type: str, options: LossOptions) -> Objective:
    """The objective of one of `LOSSES`: its sum over a batch's pairs, to be divided by the pairs of a whole step."""
    loss_of_pairs, needs_reference = LOSSES[loss_type], loss_type not in REFERENCE_FREE

    def loss(model: Decoder, batch: PairBatch) -> LossSum:
        scores = score_pairs(model, batch, needs_reference)
        return LossSum(loss_of_pairs(scores, options).sum(), batch.pairs, pair_metrics(scores, options, loss_type))

    return Objective(loss, lambda batch: batch.pairs)


@torch.no_grad()
def pair_metrics(s: Scores, options: LossOptions, loss_type: str) -> dict[str, float]:
    """Sums over the pairs of what is worth watching; divided by their number they are means.

    `rewards_*` and `reward_margin` are implicit rewards, `reward_accuracy` counts pairs whose chosen response has
    strictly the higher one (none does before training, when all are 0). `logps_*` are log-probabilities of whole
    responses in nats, `logps_accuracy` counts pairs whose chosen response is the more probable one. `kl` is the mean of
    both responses' log π/π_ref: how far, on this data, the policy has moved from the reference; it may be negative,
    because the responses are not the policy's own."""
    chosen, rejected = implicit_rewards(s, options, loss_type)
    sums = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).float(),
        "logps_chosen": s.chosen,
        "logps_rejected": s.rejected,
        "logps_accuracy": (s.chosen > s.rejected).float(),
    }
    if loss_type not in REFERENCE_FREE:
        sums["kl"] = (s.chosen_logratio + s.rejected_logratio) / 2
    values = torch.stack([value.sum() for value in sums.values()]).tolist()  # one wait for the device, not eight
    return dict(zip(sums, values, strict=True))


def precompute_reference(model: Decoder, pairs: Sequence[PairDocument], batch_size: int) -> np.ndarray:
    """(len(pairs), 2) float32: `reference_logps` of chosen and rejected, longest pairs first, so that too little memory
    shows at once.

    The sums of a batched product may be ordered by the batch's size, so these agree with those computed beside the
    policy to rounding (about 1e-6 of a log-probability), not bit for bit."""
    logps = np.empty((len(pairs), 2), dtype=np.float32)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].inputs, reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate_pairs([pairs[i] for i in chosen], share_prefixes=True)
        logps[chosen] = reference_logps(model, batch.row).view(-1, 2).cpu().numpy()
    return logps


def fill_reference(
    path: Path, key: dict, model: Decoder, pairs: Sequence[PairDocument], batch_size: int
) -> tuple[list[PairDocument], bool]:
    """The pairs with their reference, and whether it was computed: it is read from `path` if that was written for `key`
    (JSON values that name data and model), else computed and written there, whole or not at all."""
    record = _read_record(path)
    is_new = record is None or record.get("key") != key or len(record.get("logps", ())) != len(pairs)
    if is_new:
        logps = precompute_reference(model, pairs, batch_size)
        write_atomic(path, json.dumps({"key": key, "logps": logps.tolist()}) + "\n")
    else:
        logps = np.array(record["logps"], dtype=np.float32)
    return [replace(pair, reference=row) for pair, row in zip(pairs, logps, strict=True)], is_new


def _read_record(path: Path) -> dict | None:
    """The file's object; None without a file or with one that is not ours to read, which is then made anew."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut by a crash of the machine: worth nothing, and cheap to make again
        return None
    return record if isinstance(record, dict) else None
