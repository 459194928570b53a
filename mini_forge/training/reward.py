"""The reward model: one number for a response, learnt from pairs. Bradley and Terry, "Rank analysis of incomplete block
designs", 1952; for language models InstructGPT (2203.02155) Eq. 1.

    loss = -log σ(r_w - r_l - margin) + c·(r_w + r_l)²

It is a LoRA adapter on the decoder and a scalar head on the hidden state of a document's last token: the token that
ends the response, where the whole of it has been read. A run's reward, policy and value share one backbone, which
`adapters_swap.swapped` lends to each in turn.

What PPO asks is a `Scorer`: responses in, numbers out, whether a model or a user's function makes them.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mini_forge.data.batches import Batch
from mini_forge.data.pairs import PairBatch
from mini_forge.errors import SignalExit, TrainingError
from mini_forge.model.decoder import Decoder, evaluating
from mini_forge.model.transfer import to_device
from mini_forge.training.adapters_swap import Factors, swapped
from mini_forge.training.losses import LossSum, Objective

# Rollouts to their scores (n,) float32 on the CPU. A rollout has `prompt_ids` and `response_ids` (lists of int),
# `prompt` and `response` (their text without special tokens) and `row` (the dict of the dataset).
Scorer = Callable[[Sequence], torch.Tensor]


class RewardHead(nn.Module):
    """A linear map from a hidden state to one number, float32: 16 bits could not tell two good responses apart."""

    def __init__(self, size: int, generator: torch.Generator | None = None, pad_id: int | None = None):
        """The weight starts from N(0, 1/(D+1)), so that scores begin around ±1 ("Learning to summarize", 2009.01325).

        pad_id: a token at which nothing is scored. Sequence classifiers of Hugging Face pass over their padding token
        wherever it stands, at the end of a response too; ours have none."""
        super().__init__()
        self.pad_id = pad_id
        self.score = nn.Linear(size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            self.score.weight.normal_(0.0, 1 / math.sqrt(size + 1), generator=generator)

    @classmethod
    def of(cls, weight: torch.Tensor, pad_id: int | None = None) -> "RewardHead":
        """The head with this weight (1, D), on its device."""
        head = cls(weight.shape[1], pad_id=pad_id).to(weight.device)
        with torch.no_grad():
            head.score.weight.copy_(weight)
        return head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) hidden states of any dtype → (…,) float32."""
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """-log σ(r_w - r_l - margin) + c·(r_w + r_l)². InstructGPT (2203.02155) Eq. 1; margin, what the chosen response
    must be ahead by: Llama 2 (2307.09288) Eq. 2; centering, c, which keeps scores around 0: (2312.09244) Eq. 4.

    chosen, rejected (P,) float32; margin a number or (P,). Returns (P,) in nats, differentiable in both scores."""
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + centering * (chosen + rejected) ** 2 if centering else loss


def rewards(model: Decoder, head: RewardHead, batch: Batch) -> torch.Tensor:
    """The score of each of the batch's documents, (documents,) float32, differentiable in adapter and head."""
    ids, position, document = whole_documents(batch)
    return _score_rows(model, head, ids, position, document, batch.documents)


def reward_objective(head: RewardHead, margin: float = 0.0, centering: float = 0.0) -> Objective:
    """`bradley_terry` over a batch's pairs, to be divided by the pairs of a whole step. The head's parameters are
    trained beside the model's: the optimizer must be given both."""

    def loss(model: Decoder, batch: PairBatch) -> LossSum:
        chosen, rejected = rewards(model, head, batch.row).view(-1, 2).unbind(1)
        total = bradley_terry(chosen, rejected, margin, centering).sum()
        return LossSum(total, batch.pairs, reward_metrics(chosen, rejected))

    return Objective(loss, lambda batch: batch.pairs)


@torch.no_grad()
def reward_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """Sums over the pairs; divided by their number they are means. `reward_accuracy` counts pairs whose chosen response
    has strictly the higher score."""
    sums = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).float(),
    }
    values = torch.stack([value.sum() for value in sums.values()]).tolist()  # one wait for the device, not four
    return dict(zip(sums, values, strict=True))


def whole_documents(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, position, document), each (1, T + documents) int64: the batch's documents with their last tokens.

    A batch for next-token losses ends each document one token early; the last one is its last target, because a
    document ends with a token of its response."""
    assert batch.parents is None, "a batch whose documents share their beginnings has no whole ones"
    document = batch.document.flatten()
    T = len(document)
    lengths = torch.bincount(document, minlength=batch.documents)
    ends = lengths.cumsum(0) - 1  # of inputs
    number = torch.arange(batch.documents)
    ids = torch.empty(T + batch.documents, dtype=torch.int64)
    ids[torch.arange(T) + document] = batch.input_ids.flatten()  # one place on for each document before
    ids[ends + number + 1] = batch.targets.flatten()[ends]
    whole = number.repeat_interleave(lengths + 1)
    starts = ends + 1 - lengths + number
    position = torch.arange(len(ids)) - starts[whole]
    return ids[None], position[None], whole[None]


def model_scorer(model: Decoder, factors: Factors | None, head: RewardHead, batch_size: int = 8) -> Scorer:
    """Scores by `model` with the adapter `factors` (None: as it is) and the head, `batch_size` responses at a time.

    Without dropout, gradients or padding; longest first, so that too little memory shows at once. Raises TrainingError
    for a score that is not finite."""

    def score(rollouts: Sequence) -> torch.Tensor:
        texts = [[*rollout.prompt_ids, *rollout.response_ids] for rollout in rollouts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        scores = torch.empty(len(texts), dtype=torch.float32)
        with evaluating(model), swapped(model, factors):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                scores[chosen] = _score_texts(model, head, [texts[i] for i in chosen]).cpu()
        return _finite(scores, "the reward model", rollouts)

    return score


def function_scorer(function: Callable[[list[str], list[str], list[dict]], Sequence[float]], name: str = "") -> Scorer:
    """Scores by a user's function (prompts, responses, rows) -> numbers, one for each response.

    Raises TrainingError where the function raises, or returns anything but as many finite numbers."""
    name = f"reward_function {name}".strip()

    def score(rollouts: Sequence) -> torch.Tensor:
        columns = ([getattr(rollout, column) for rollout in rollouts] for column in ("prompt", "response", "row"))
        try:
            returned = function(*columns)
        except SignalExit:
            raise
        except (Exception, SystemExit) as error:  # any: it is not our code
            raise TrainingError(f"{name}: raised {_place(error)}") from error
        return _finite(_numbers(returned, len(rollouts), name), name, rollouts)

    return score


NO_LISTS = (Mapping, Set, str, bytes)  # whose elements are no rewards, though they may be numbers


def _numbers(returned, count: int, name: str) -> torch.Tensor:
    try:
        if isinstance(returned, NO_LISTS):
            raise TypeError
        scores = torch.tensor([float(value) for value in returned], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several values
        kind = type(returned).__name__
        raise TrainingError(f"{name}: returned {kind} {returned!r:.80}; a list of {count} numbers is needed") from None
    if len(scores) != count:
        raise TrainingError(f"{name}: returned {len(scores)} numbers for {count} responses; one each is needed")
    return scores


def _place(error: BaseException) -> str:
    """The error with the file and line that raised it: the command line shows no traceback."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"


def _finite(scores: torch.Tensor, name: str, rollouts: Sequence) -> torch.Tensor:
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise TrainingError(
            f"{name}: the score of {len(wrong)} of {len(scores)} responses is not a finite number, the first "
            f"{float(scores[wrong[0]])} for {rollouts[wrong[0]].response!r:.80}"
        )
    return scores


def _score_texts(model: Decoder, head: RewardHead, texts: list[list[int]]) -> torch.Tensor:
    """(len(texts),) float32: token sequences, none empty, end to end in one row."""
    lengths = [len(text) for text in texts]
    rows = (
        np.concatenate(texts),
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat(np.arange(len(texts)), lengths),
    )
    rows = [torch.from_numpy(row.astype(np.int64))[None] for row in rows]
    return _score_rows(model, head, *rows, len(texts))


def _score_rows(model, head, ids, position, document, documents: int) -> torch.Tensor:
    hidden = model(ids, position, document).flatten(0, 1)
    scored = _scored_tokens(ids.flatten(), document.flatten(), documents, head.pad_id)
    return head(hidden.index_select(0, to_device(scored, hidden.device)))


def _scored_tokens(ids: torch.Tensor, document: torch.Tensor, documents: int, pad_id: int | None) -> torch.Tensor:
    """(documents,) int64: where each document's last token stands, or its last but for padding tokens."""
    lengths = torch.bincount(document, minlength=documents)
    last = lengths.cumsum(0) - 1
    if pad_id is None:
        return last
    first = last + 1 - lengths  # the choice of Hugging Face's classifiers where all is padding
    index = torch.arange(len(ids))
    return first.scatter_reduce(0, document, torch.where(ids == pad_id, first[document], index), "amax")
