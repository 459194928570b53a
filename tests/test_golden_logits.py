"""Logits of every family equal transformers' on the golden checkpoints, alone and packed into one row."""

import pytest
import torch
from safetensors import safe_open

import mini_forge
from mini_forge.model.families.layout import text_name
from mini_forge.model.stacks import StackMxfp4
from tests.golden_files import FAMILIES, family

# float32 sums in another order differ by about 1e-6 of the logits' spread; a wrong option by 1e-2 and more.
TOLERANCE = 2e-4


def worst(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the expected logits."""
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    return float((logits - expected).abs().max() / expected.std())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    folder, input_ids, expected = family(request.param)
    return mini_forge.load_model(folder, dtype=torch.float32, device="cpu"), input_ids, expected


@torch.no_grad()
def test_logits_equal_transformers(case):
    model, input_ids, expected = case
    assert worst(model.logits(input_ids), expected) < TOLERANCE


@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone(case):
    model, input_ids, expected = case
    B, T = input_ids.shape
    position = torch.arange(T).repeat(B)[None]
    document = torch.arange(B).repeat_interleave(T)[None]
    packed = model.logits(input_ids.reshape(1, B * T), position=position, document=document)
    assert worst(packed.view(B, T, -1), expected) < TOLERANCE


@torch.no_grad()
def test_a_short_document_before_leaves_the_next_one_alone(case):
    """Documents of unequal length: the cut of the first row, then the whole second row."""
    model, input_ids, expected = case
    T = input_ids.shape[1]
    short = 5
    packed_ids = torch.cat([input_ids[0, :short], input_ids[1]])[None]
    position = torch.cat([torch.arange(short), torch.arange(T)])[None]
    document = (torch.arange(short + T) >= short).long()[None]
    packed = model.logits(packed_ids, position=position, document=document)
    assert worst(packed[:, :short], expected[:1, :short]) < TOLERANCE
    assert worst(packed[:, short:], expected[1:]) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_carry_the_checkpoints_names(name):
    """Every stored text tensor has its parameter and every parameter its tensor; MXFP4 is two tensors of one stack."""
    folder = family(name)[0]
    model = mini_forge.load_model(folder)
    assert text_tensors(folder, model.layout) == {n for n, _ in model.named_parameters()} | packed_names(model)


def text_tensors(folder, layout) -> set[str]:
    """The names of the folder's text tensors, those of experts by the stack they belong to."""
    stored = set()
    for file in folder.glob("*.safetensors"):
        if file.name != "expected.safetensors":
            with safe_open(file, "pt") as tensors:
                stored |= set(tensors.keys())
    names = {text_name(name, layout) for name in stored} - {None}
    places = {name: layout and layout.place(name) for name in names}
    return {place.name if place else name for name, place in places.items()}


def packed_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, StackMxfp4)}


def test_only_mxfp4_checkpoints_keep_stacks_in_few_bits():
    packed = {name: packed_names(mini_forge.load_model(family(name)[0])) for name in FAMILIES}
    stacks = {f"model.layers.{i}.mlp.experts.{leaf}_proj" for i in (0, 1) for leaf in ("gate_up", "down")}
    assert {name: found for name, found in packed.items() if found} == {"gpt_oss_mxfp4": stacks}
