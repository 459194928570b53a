"""Ten steps of `mini_forge.train` equal the stored steps of a plain transformers+PEFT loop, on the same text."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.data.batches import tokenize
from mini_forge.data.chat import choose_template
from mini_forge.data.tasks import load_examples
from tests import golden_files as golden

QUANTIZATION = {
    "dense": {"use_4bit": False},
    "nf4": {"use_4bit": True, "bnb_4bit_quant_type": "nf4", "use_nested_quant": False},
    "nf4_nested": {"use_4bit": True, "bnb_4bit_quant_type": "nf4", "use_nested_quant": True},
}
# Summing the reference's own rows one by one instead of as a padded batch moves its losses by 1e-7 relative and its
# adapter by less than 2e-6, so these bounds leave room for another order of sums and for nothing else: dense and NF4
# end 2e-2 apart, NF4 and nested NF4 7e-3.
LOSS_RELATIVE = 1e-4
NORM_RELATIVE = 1e-3
ADAPTER_ABSOLUTE = 2e-5


def settings(storage: str, batch_size: int, accumulation: int, **others) -> dict:
    wanted = golden.reference(storage).settings
    return {
        "task": "text-generation", "compute_specs": "low_end",
        "model_name": str(golden.BASE), "dataset": str(golden.DATASET),
        "init_adapter": str(golden.INIT_ADAPTER), "lora_r": wanted["lora_r"], "lora_alpha": wanted["lora_alpha"],
        "lora_dropout": 0.0, "dtype": "float32", "bnb_4bit_compute_dtype": "float32", "device": "cpu",
        **QUANTIZATION[storage],
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "num_train_epochs": wanted["steps"], "learning_rate": wanted["learning_rate"],
        "weight_decay": wanted["weight_decay"], "max_grad_norm": wanted["max_grad_norm"], "optim": "adamw_torch",
        "lr_scheduler_type": wanted["lr_scheduler_type"], "max_seq_length": 256, "eval_split": 0, "logging_steps": 1,
        "save_strategy": "no", **others,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(storage, batch_size, accumulation, **others) -> RunResult; the same arguments train once."""

    @functools.cache
    def train(storage, batch_size, accumulation, **others):
        folder = tmp_path_factory.mktemp(storage) / "run"
        config = settings(storage, batch_size, accumulation, output_dir=str(folder), **others)
        return mini_forge.train(mini_forge.TrainingConfig.from_dict(config))

    return train


def assert_equals_reference(result, storage):
    expected = golden.reference(storage)
    steps = [record for record in result.metrics if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx(expected.losses, rel=LOSS_RELATIVE)
    assert [record["grad_norm"] for record in steps] == pytest.approx(expected.grad_norms, rel=NORM_RELATIVE)
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    assert adapter.keys() == expected.adapter.keys()
    worst = max(float((adapter[name] - expected.adapter[name]).abs().max()) for name in adapter)
    assert worst < ADAPTER_ABSOLUTE


@pytest.mark.parametrize("storage", golden.STORAGES)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_ten_steps_equal_the_peers(run, storage, batch_size, accumulation):
    assert_equals_reference(run(storage, batch_size, accumulation), storage)


@pytest.mark.parametrize("option", [{"gradient_checkpointing": False}, {"group_by_length": False}, {"packing": True}])
def test_ten_steps_do_not_depend_on(run, option):
    """How memory is saved and how rows are arranged within a step is no part of the result."""
    batch_size = 8  # of rows, or of packed bins of 256 tokens: either holds the whole dataset
    assert_equals_reference(run("dense", batch_size, 1, **option), "dense")


def test_fewer_rows_in_the_last_microbatch_weigh_by_their_tokens(run):
    """3 + 3 + 2 rows: a mean of microbatch means would differ."""
    assert_equals_reference(run("dense", 3, 3), "dense")


@pytest.mark.parametrize("storage", ["nf4", "nf4_nested"])
def test_quantized_base_moves_the_adapter_the_same_way(run, storage):
    """The cosine of what training added to each tensor."""
    start, expected = golden.initial_adapter(), golden.reference(storage).adapter
    adapter = load_file(run(storage, 8, 1).output_dir / "adapter_model.safetensors")
    for name in expected:
        ours, theirs = (adapter[name] - start[name]).flatten(), (expected[name] - start[name]).flatten()
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999, name


def test_rows_have_the_tokens_and_masks_of_the_hugging_face_tokenizer():
    tokenizer = mini_forge.load_tokenizer(golden.BASE)
    template = choose_template(None, str(golden.BASE), tokenizer, "text-generation")
    examples = load_examples(str(golden.DATASET), "text-generation")
    documents, stats = tokenize(examples, template, tokenizer, 256, False, None)
    assert stats.dropped == stats.truncated == 0
    for document, (ids, is_trained) in zip(documents, golden.tokenised_rows(), strict=True):
        last = len(document.ids)  # what follows the last trained-on token may be cut
        assert document.ids.tolist() == ids[:last]
        assert document.is_trained.tolist() == is_trained[:last]
        assert not any(is_trained[last:])


@torch.no_grad()
def test_rslora_scales_by_alpha_over_root_r(tmp_path):
    adapter = shutil.copytree(golden.INIT_ADAPTER, tmp_path / "adapter")
    record = json.loads((adapter / "adapter_config.json").read_text())
    record |= {"use_rslora": True, "base_model_name_or_path": str(golden.BASE)}
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    input_ids, expected = golden.rslora_logits()
    logits = mini_forge.load_model(adapter).logits(input_ids)
    assert float((logits - expected).abs().max() / expected.std()) < 2e-4
