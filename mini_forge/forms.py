"""The form of rows that a run trains on, and all that hangs on it: texts, pairs of responses, or labelled responses."""

from collections.abc import Callable
from dataclasses import dataclass

from mini_forge.config import UNPAIRED_LOSSES, TrainingConfig
from mini_forge.data.batches import collate, show_example, tokenize
from mini_forge.data.labelled import collate_labelled, labelled_fingerprint, show_labelled, tokenize_labelled
from mini_forge.data.pairs import collate_pairs, data_fingerprint, show_pair, tokenize_pairs
from mini_forge.inference.evaluate import evaluate_labelled, evaluate_loss, evaluate_pairs
from mini_forge.training.kto import label_means


@dataclass(frozen=True)
class Form:
    """What is done with rows of one form. `limit`: of a document, in tokens; `share`: whether what documents of a
    microbatch begin with is computed once; `sums`: `Objective.sums`.

    tokenize(rows, config, template, tokenizer, limit) → documents and what that took
    batch(documents, share, limit) → a microbatch
    fingerprint(documents) → a checksum, by which a resumed run knows that its data are the same
    show(document, tokenizer) → its text, with what is trained on between ⟦ and ⟧
    evaluate(model, documents, sums, batch_size, limit) → `eval_…` metrics
    logged(record) → a record of metrics as it is logged"""

    tokenize: Callable
    batch: Callable
    fingerprint: Callable
    show: Callable
    evaluate: Callable
    logged: Callable = lambda record: record


def _of_responses(tokenize_rows: Callable) -> Callable:
    """`Form.tokenize` of rows whose prompts are never trained on, whatever `train_on_prompt` says."""
    return lambda rows, config, template, tokenizer, limit: tokenize_rows(
        rows, template, tokenizer, limit, config.system_prompt
    )


TEXTS = Form(
    lambda rows, config, template, tokenizer, limit: tokenize(
        rows, template, tokenizer, limit, config.train_on_prompt, config.system_prompt
    ),
    lambda documents, share, limit: collate(documents, share),
    data_fingerprint,
    show_example,
    lambda model, documents, sums, batch_size, limit: evaluate_loss(model, documents, sums, batch_size=batch_size),
)
PAIRS = Form(
    _of_responses(tokenize_pairs),
    lambda pairs, share, limit: collate_pairs(pairs, share),
    data_fingerprint,
    show_pair,
    lambda model, pairs, sums, batch_size, limit: evaluate_pairs(model, pairs, sums, batch_size=batch_size),
)
LABELLED = Form(
    _of_responses(tokenize_labelled),
    lambda documents, share, limit: collate_labelled(documents, limit, share),
    labelled_fingerprint,
    show_labelled,
    lambda model, documents, sums, batch_size, limit: label_means(
        evaluate_labelled(model, documents, sums, batch_size=batch_size, max_length=limit), "eval_"
    ),
    lambda record: label_means(record) if "loss" in record else record,
)


def form_of(config: TrainingConfig) -> Form:
    """What the run trains on; of rlhf what its reward model is trained on, or its prompts, which are texts."""
    if config.strategy == "dpo":
        return LABELLED if config.loss_type in UNPAIRED_LOSSES else PAIRS
    return PAIRS if trains_reward(config) else TEXTS


def trains_reward(config: TrainingConfig) -> bool:
    """Whether the run's first stage is a reward model from pairs: where no reward is given."""
    return config.strategy == "rlhf" and not config.reward_model and not config.reward_function
