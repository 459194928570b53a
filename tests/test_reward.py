"""The reward model: its loss by hand, where it scores, several adapters on one backbone, and what it is stored as."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_forge.data.batches import Document, collate
from mini_forge.data.pairs import PairDocument, collate_pairs, flatten
from mini_forge.errors import CheckpointError, ConfigError, SignalExit, TrainingError
from mini_forge.io.adapters import load_adapter
from mini_forge.io.rewards import load_function, load_reward, save_reward
from mini_forge.io.weights import load_base
from mini_forge.model.lora import LoraSpec, disabled, inject, lora_layers
from mini_forge.training.adapters_swap import copied_factors, fresh_factors, live_factors, put_factors, swapped
from mini_forge.training.reward import (
    RewardHead,
    bradley_terry,
    function_scorer,
    model_scorer,
    reward_metrics,
    reward_objective,
    rewards,
    whole_documents,
)
from tests import golden_files as golden
from tests import tiny_experts
from tests.tiny import CONFIG, random_model

SPEC = LoraSpec(4, 8.0)
D = CONFIG["hidden_size"]


def documents(*sides: tuple[list[int], int]) -> list[PairDocument]:
    """Pairs of (ids, prompt tokens), chosen and rejected in turn."""
    made = [Document(np.array(ids, np.int32), np.arange(len(ids)) >= n, i) for i, (ids, n) in enumerate(sides)]
    return [PairDocument(*made[i : i + 2]) for i in range(0, len(made), 2)]


PAIRS = documents(([5, 6, 7, 8, 9], 2), ([5, 6, 200, 11], 2), ([40, 41, 42, 43], 3), ([40, 41, 42, 3, 3, 3, 17], 3))


def draw_factors(model, seed: int):
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.2, generator=generator)


@pytest.fixture
def model():
    model = random_model()
    inject(model, SPEC, torch.Generator().manual_seed(0))
    draw_factors(model, 1)
    return model


@pytest.fixture
def head():
    return RewardHead(D, torch.Generator().manual_seed(2))


def rollout(prompt_ids, response_ids, **fields):
    return SimpleNamespace(prompt_ids=prompt_ids, response_ids=response_ids, **{"response": "r", **fields})


@torch.no_grad()
def score_alone(model, head, ids) -> float:
    """The head on the last hidden state of one sequence by itself, in float64."""
    hidden = model(torch.tensor([list(map(int, ids))]))[0, -1].double()
    return float(hidden @ head.score.weight[0].double())


# --- the loss ---


def test_the_loss_by_hand():
    """-log σ(2 - 1) = log(1 + e⁻¹); a margin of 1 makes it log 2; c·(2 + 1)² is 9c."""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    assert float(bradley_terry(chosen, rejected)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(bradley_terry(chosen, rejected, margin=1.0)) == pytest.approx(math.log(2))
    assert float(bradley_terry(chosen, rejected, 1.0, 0.01)) == pytest.approx(math.log(2) + 0.09)
    assert float(bradley_terry(rejected, chosen)) == pytest.approx(math.log(1 + math.exp(1)))
    each = bradley_terry(chosen.repeat(2), rejected.repeat(2), torch.tensor([0.0, 1.0]))
    assert each.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])


def test_far_apart_scores_give_finite_losses():
    loss = bradley_terry(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert loss.tolist() == pytest.approx([1000, 0])


def test_the_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda w, r: bradley_terry(w, r, 0.3, 0.1), scores)


def test_adapter_and_head_get_the_gradient_of_finite_differences(model, head):
    """Through the whole model: its norms and rotations are float32 even here, so the step is wide."""
    model.double()
    head.double()
    batch = collate_pairs(PAIRS)
    objective = reward_objective(head, 0.2, 0.1)
    objective.loss(model, batch).total.backward()
    layer = dict(lora_layers(model))["model.layers.0.self_attn.q_proj"]
    for parameter in (head.score.weight, layer.lora_A, layer.lora_B):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        before, sides = parameter.data.clone(), []
        for sign in (1, -1):
            parameter.data = before + sign * 1e-3 * direction
            with torch.no_grad():
                sides.append(float(objective.loss(model, batch).total))
        parameter.data = before
        slope = (sides[0] - sides[1]) / 2e-3
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=3e-3) and abs(slope) > 1e-2


def test_the_objective_sums_over_pairs_and_counts_them(model, head):
    objective = reward_objective(head, 0.2, 0.1)
    total, count, metrics = objective.sums(model, collate_pairs(PAIRS))
    r = [score_alone(model, head, side.ids) for side in flatten(PAIRS)]
    expected = sum(math.log(1 + math.exp(-(w - l - 0.2))) + 0.1 * (w + l) ** 2 for w, l in (r[:2], r[2:]))  # noqa: E741
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    assert count == objective.count(collate_pairs(PAIRS)) == 2
    assert metrics == pytest.approx({
        "rewards_chosen": r[0] + r[2], "rewards_rejected": r[1] + r[3], "reward_margin": r[0] + r[2] - r[1] - r[3],
        "reward_accuracy": (r[0] > r[1]) + (r[2] > r[3]),
    }, abs=1e-4)  # fmt: skip


def test_equal_scores_are_no_success():
    metrics = reward_metrics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 4.0]))
    assert metrics == {"rewards_chosen": 6, "rewards_rejected": 6, "reward_margin": 0, "reward_accuracy": 1}


# --- where it scores ---


def test_documents_get_their_last_tokens_back():
    ids, position, document = whole_documents(collate(flatten(PAIRS)))
    sides = [side.ids.tolist() for side in flatten(PAIRS)]
    assert ids[0].tolist() == sum(sides, [])
    assert position[0].tolist() == [i for side in sides for i in range(len(side))]
    assert document[0].tolist() == [n for n, side in enumerate(sides) for _ in side]


def test_packed_documents_are_scored_at_their_last_tokens_as_each_alone(model, head):
    scores = rewards(model, head, collate(flatten(PAIRS)))
    assert scores.shape == (4,) and scores.dtype == torch.float32 and scores.requires_grad
    alone = [score_alone(model, head, side.ids) for side in flatten(PAIRS)]
    assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    without_end = [score_alone(model, head, side.ids[:-1]) for side in flatten(PAIRS)]
    assert min(abs(a - b) for a, b in zip(alone, without_end, strict=True)) > 1e-2


def test_batches_of_rollouts_are_scored_as_each_alone_in_their_own_order(model, head):
    rollouts = [rollout(list(range(20, 20 + n)), list(range(90, 90 + m))) for n, m in ((3, 2), (9, 1), (1, 1), (4, 7))]
    texts = [[*r.prompt_ids, *r.response_ids] for r in rollouts]
    for batch_size in (1, 3, 8):
        scores = model_scorer(model, None, head, batch_size)(rollouts)
        assert scores.dtype == torch.float32 and not scores.requires_grad
        assert scores.tolist() == pytest.approx([score_alone(model, head, text) for text in texts], abs=1e-5)


def test_dropout_is_off_when_scoring_and_the_mode_is_put_back(model, head):
    for _, layer in lora_layers(model):
        layer.dropout = 0.9
    model.train()
    score = model_scorer(model, None, head)
    rollouts = [rollout([5, 6], [7, 8])]
    assert float(score(rollouts)) == float(score(rollouts)) and model.training


def test_padding_tokens_are_passed_over_where_the_checkpoint_says_so(model, head):
    """As transformers does; a text of nothing else is scored at its first token."""
    head.pad_id = 3
    rollouts = [rollout([3, 5, 6], [7, 3, 3]), rollout([5, 6, 3], [7, 8]), rollout([3], [3, 3])]
    expected = [score_alone(model, head, ids) for ids in ([3, 5, 6, 7], [5, 6, 3, 7, 8], [3])]
    assert model_scorer(model, None, head)(rollouts).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_score_that_is_no_number_is_refused(model, head):
    head.score.weight.data[0, 0] = math.nan
    with pytest.raises(TrainingError, match="reward model: the score of 1 of 1 responses .* nan for 'so what'"):
        model_scorer(model, None, head)([rollout([5], [6], response="so what")])


def test_scores_of_16_bit_models_are_float32(model, head):
    assert rewards(model.bfloat16(), head, collate_pairs(PAIRS).row).dtype == torch.float32
    assert head.score.weight.dtype == torch.float32


def test_a_fresh_head_has_the_deviation_of_its_source_and_follows_its_seed():
    a, b = (RewardHead(10_000, torch.Generator().manual_seed(5)).score.weight for _ in range(2))
    assert torch.equal(a, b) and float(a.detach().std()) == pytest.approx(1 / math.sqrt(10_001), rel=0.03)
    assert RewardHead(8).score.bias is None


# --- one backbone, several adapters ---


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_swapped_adapter_is_the_model_with_that_adapter_and_leaves_no_trace(model):
    other = random_model()
    inject(other, LoraSpec(2, 6.0, use_rslora=True), torch.Generator().manual_seed(8))
    draw_factors(other, 9)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        own, wanted = model.logits(ids), other.logits(ids)
    before, parameters = state(model), list(model.parameters())
    pointers = [p.data_ptr() for p in parameters]
    with swapped(model, live_factors(other)), torch.no_grad():
        assert torch.equal(model.logits(ids), wanted) and not torch.equal(own, wanted)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.logits(ids), own)


def test_swapping_copies_nothing(model):
    factors = copied_factors(model)
    base = {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    with swapped(model, factors):
        assert base == {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
        for name, layer in lora_layers(model):
            assert layer.lora_A.data_ptr() == factors[name][0].data_ptr()
            assert layer.lora_B.data_ptr() == factors[name][1].data_ptr()


def test_copied_factors_stay_as_they_were_while_live_ones_follow(model):
    name, layer = next(lora_layers(model))
    copied, live = copied_factors(model)[name], live_factors(model)[name]
    with torch.no_grad():
        layer.lora_A += 1
    assert torch.equal(live[0], layer.lora_A) and torch.allclose(copied[0] + 1, layer.lora_A)
    assert not copied[0].requires_grad and not live[0].requires_grad


def test_an_error_inside_puts_the_adapter_back(model):
    before, factors = live_factors(model), fresh_factors(model, SPEC)
    with pytest.raises(KeyError), swapped(model, factors):
        raise KeyError
    assert all(layer.lora_A.data_ptr() == before[name][0].data_ptr() for name, layer in lora_layers(model))


def test_layers_that_an_adapter_lacks_are_off_meanwhile_and_switches_are_put_back(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), disabled(model):
        base = model.logits(ids)
        with swapped(model, {}):
            assert torch.equal(model.logits(ids), base)
        assert not any(layer.enabled for _, layer in lora_layers(model))
    assert all(layer.enabled for _, layer in lora_layers(model))
    with torch.no_grad(), swapped(model, {}):
        assert torch.equal(model.logits(ids), base)
    only = {name: each for name, each in copied_factors(model).items() if name.endswith("q_proj")}
    with swapped(model, only):
        assert [name for name, layer in lora_layers(model) if layer.enabled] == list(only)


def test_training_one_adapter_between_swaps_is_training_it_alone(head):
    """The optimizer holds the parameters, which stay the same objects; another rank leaves their gradients alone."""
    results = []
    for with_swaps in (False, True):
        model = random_model()
        inject(model, SPEC, torch.Generator().manual_seed(0))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        other = fresh_factors(model, LoraSpec(2, 4.0), torch.Generator().manual_seed(3))
        for _ in range(3):
            reward_objective(head).loss(model, collate_pairs(PAIRS)).total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            if with_swaps:
                model_scorer(model, other, head)([rollout([5, 6], [7])])
        results.append(copied_factors(model))
    for name, (A, B, _) in results[0].items():
        assert torch.equal(A, results[1][name][0]) and torch.equal(B, results[1][name][1])


@pytest.mark.parametrize("kind", [None, "qwen3_moe"])
def test_fresh_factors_are_those_of_injecting(tmp_path, kind):
    def make():
        return random_model() if kind is None else load_base(tiny_experts.write_checkpoint(tmp_path / "base", kind))

    targets = None if kind is None else ("q_proj", "experts.gate_up_proj", "experts.down_proj")
    spec, generator = LoraSpec(4, 8.0, targets=targets), torch.Generator().manual_seed(3)
    used, untouched = make(), make()
    inject(used, spec, torch.Generator().manual_seed(0))
    draw_factors(used, 1)
    put_factors(used, fresh_factors(used, spec, generator))
    inject(untouched, spec, torch.Generator().manual_seed(3))
    expected = live_factors(untouched)
    for name, (A, B, scaling) in live_factors(used).items():
        assert torch.equal(A, expected[name][0]) and torch.equal(B, expected[name][1]) and scaling == 2.0


def test_factors_of_another_model_are_refused(model):
    with pytest.raises(ConfigError, match="has nonsense .*does not adapt"):
        put_factors(model, {"nonsense": live_factors(model)["model.layers.0.self_attn.q_proj"]})
    q, k = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj"))
    with pytest.raises(ConfigError, match="do not fit a layer of 32 to 16"):
        put_factors(model, {k: live_factors(model)[q]})


# --- on disk ---

ROLLOUTS = [rollout([5, 6, 7], [8, 9, 1]), rollout([40, 41], [42, 3])]


def saved(base: Path, folder: Path, spec: LoraSpec = SPEC):
    """A reward adapter on `base`, in `folder`; and what it says of ROLLOUTS."""
    model, head = load_base(base), RewardHead(load_base(base).spec.hidden_size, torch.Generator().manual_seed(2))
    inject(model, spec, torch.Generator().manual_seed(5))
    draw_factors(model, 6)
    folder.mkdir()
    save_reward(folder, model, head, spec, str(base))
    return model_scorer(model, None, head)(ROLLOUTS)


def scores_of(stored):
    return model_scorer(stored.model, stored.factors, RewardHead.of(stored.score, stored.pad_id))(ROLLOUTS)


@pytest.mark.parametrize("spec", [SPEC, LoraSpec(3, 8.0, targets=("q_proj", "down_proj"), use_rslora=True)], ids=str)
def test_a_saved_reward_model_comes_back_on_the_same_backbone(tiny, tmp_path, spec):
    expected = saved(tiny, tmp_path / "reward", spec)
    model = load_base(tiny)
    inject(model, SPEC, torch.Generator().manual_seed(0))
    draw_factors(model, 1)
    before = state(model)
    stored = load_reward(tmp_path / "reward", model, str(tiny))
    assert stored.model is model and torch.equal(scores_of(stored), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_layers_that_the_run_does_not_adapt_has_a_backbone_of_its_own(tiny, tmp_path):
    expected = saved(tiny, tmp_path / "reward")
    model = load_base(tiny)
    inject(model, LoraSpec(4, 8.0, targets=("q_proj",)))
    stored = load_reward(tmp_path / "reward", model, str(tiny))
    assert stored.model is not model and torch.equal(scores_of(stored), expected)


def test_an_adapter_of_another_base_has_a_backbone_of_its_own(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "other")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    expected = saved(tmp_path / "other", tmp_path / "reward")
    model = load_base(tiny)
    inject(model, SPEC)
    stored = load_reward(tmp_path / "reward", model, str(tiny))
    assert stored.model is not model and torch.equal(scores_of(stored), expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_expert_stacks_come_back(tmp_path, kind):
    base = tiny_experts.write_checkpoint(tmp_path / "base", kind)
    spec = LoraSpec(2, 4.0, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))
    expected = saved(base, tmp_path / "reward", spec)
    model = load_base(base)
    inject(model, spec)
    stored = load_reward(tmp_path / "reward", model, str(base))
    assert stored.model is model and torch.equal(scores_of(stored), expected)


def test_the_folder_says_what_peft_needs_to_know(tiny, tmp_path):
    saved(tiny, tmp_path / "reward")
    record = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    assert (record["task_type"], record["modules_to_save"]) == ("SEQ_CLS", ["score"])
    score = load_file(tmp_path / "reward" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert score.shape == (1, D) and score.dtype == torch.float32


def change(folder: Path, record=None, tensors=None):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (record or {})))
    kept = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    save_file({n: t for n, t in kept.items() if t is not None}, folder / "adapter_model.safetensors")


SCORE = "base_model.model.score.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("changes", "message"), [
    ({"record": {"task_type": "CAUSAL_LM"}}, "task_type = 'CAUSAL_LM' is not that of a reward model"),
    ({"record": {"use_dora": True}}, "use_dora = True"),
    ({"record": {"base_model_name_or_path": ""}}, "base_model_name_or_path is empty"),
    ({"record": {"base_model_name_or_path": "./gone"}}, "base_model_name_or_path: './gone' is not a folder"),
    ({"record": {"target_modules": ["w1"]}}, "'w1' names no linear layer"),
    ({"record": {"r": 5}}, r"q_proj has factors \[4, 32\] and \[32, 4\], the model needs \[5, 32\]"),
    ({"tensors": {SCORE: None}}, "no tensor base_model.model.score.weight"),
    ({"tensors": {SCORE: torch.zeros(2, D)}}, r"score.weight has shape \[2, 32\]"),
    ({"tensors": {Q: None}}, "no adapter of model.layers.0.self_attn.q_proj"),
    ({"tensors": {"base_model.model.more": torch.zeros(1)}}, r"1 unexpected \['more'\]"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_unsound_reward_adapters_are_refused(tiny, tmp_path, changes, message):
    saved(tiny, tmp_path / "reward")
    change(tmp_path / "reward", **changes)
    model = load_base(tiny)
    inject(model, SPEC)
    with pytest.raises(CheckpointError, match=message):
        load_reward(tmp_path / "reward", model, str(tiny))


# --- Hugging Face sequence classifiers, against transformers ---


def classifier(folder: Path, score: torch.Tensor, **config) -> Path:
    """golden.BASE as a sequence classifier."""
    folder.mkdir()
    tensors = load_file(golden.BASE / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file({**tensors, "score.weight": score}, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((golden.BASE / "config.json").read_text()) | {"id2label": {"0": "LABEL_0"}, **config}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def expected():
    return json.loads((golden.GOLDEN / "reward" / "expected.json").read_text())


@pytest.mark.parametrize("pad", ["none", "in texts"])
def test_a_sequence_classifier_scores_as_in_transformers(expected, tmp_path, pad):
    case = expected["classifier"][pad]
    folder = classifier(tmp_path / "rm", torch.tensor([expected["score"]]), pad_token_id=case["pad_token_id"])
    model = load_base(golden.BASE)
    stored = load_reward(folder, model, str(golden.BASE))
    assert stored.model is not model and stored.model.lm_head is None and stored.factors is None
    head = RewardHead.of(stored.score, stored.pad_id)
    scores = model_scorer(stored.model, None, head)([rollout(ids[:1], ids[1:]) for ids in expected["texts"]])
    assert scores.tolist() == pytest.approx(case["scores"], abs=1e-4)


def test_a_classifier_without_an_output_matrix_is_whole_and_may_be_quantized(tiny, tmp_path, head):
    """`tiny` has an embedding and an output matrix of its own."""
    shutil.copytree(tiny, tmp_path / "rm")
    tensors = load_file(tiny / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["score.weight"] = head.score.weight.detach()
    save_file(tensors, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    for quantization in (None, "nf4"):
        expected = model_scorer(load_base(tiny, quantization=quantization), None, head)(ROLLOUTS)
        stored = load_reward(tmp_path / "rm", random_model(), "unused", quantization=quantization)
        assert torch.equal(scores_of(stored), expected)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_reward_adapter_works_on_a_quantized_base(tiny, tmp_path, is_shared):
    saved(tiny, tmp_path / "reward")
    model = load_base(tiny, quantization="nf4")
    expected = load_base(tiny, quantization="nf4")
    for each in (model, expected):
        inject(each, SPEC if is_shared or each is expected else LoraSpec(4, 8.0, targets=("q_proj",)))
    stored = load_reward(tmp_path / "reward", model, str(tiny), quantization="nf4")
    assert (stored.model is model) == is_shared
    put_factors(expected, stored.factors)
    assert torch.equal(scores_of(stored), model_scorer(expected, None, RewardHead.of(stored.score))(ROLLOUTS))


def test_a_folder_without_a_score_or_with_several_labels_is_refused(tmp_path):
    model = load_base(golden.BASE)
    with pytest.raises(CheckpointError, match="no tensor 'score.weight'"):
        load_reward(golden.BASE, model, str(golden.BASE))
    width = model.spec.hidden_size
    with pytest.raises(CheckpointError, match=rf"score.weight has shape \[3, {width}\]; one label"):
        load_reward(classifier(tmp_path / "rm", torch.zeros(3, width)), model, str(golden.BASE))


def test_training_equals_the_plain_loop(expected):
    """Bradley-Terry with margin and centring, AdamW on adapter and head, in transformers and PEFT."""
    wanted = expected["training"]
    model = load_base(golden.BASE)
    load_adapter(model, golden.INIT_ADAPTER)
    head = RewardHead.of(torch.tensor([expected["score"]]))
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=wanted["learning_rate"], weight_decay=0.0)
    objective = reward_objective(head, wanted["margin"], wanted["centering"])
    batch = collate_pairs(documents(*((ids, 1) for ids in expected["texts"])))
    losses = []
    for _ in wanted["losses"]:
        loss = objective.loss(model, batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()) / loss.count)
    assert losses == pytest.approx(wanted["losses"], rel=1e-4)
    assert head.score.weight[0].tolist() == pytest.approx(wanted["score"], abs=1e-4)
    assert losses[-1] < 0.5 * losses[0]


# --- a user's function ---


def scored(function, count=2):
    rollouts = [rollout([1], [2], prompt=f"p{i}", response=f"r{i}", row={"n": i}) for i in range(count)]
    return function_scorer(function, "rules:score")(rollouts)


def test_a_function_gets_prompts_responses_and_rows_and_gives_scores():
    def score(prompts, responses, rows):
        assert (prompts, responses, rows) == (["p0", "p1"], ["r0", "r1"], [{"n": 0}, {"n": 1}])
        return [1, 2.5]

    scores = scored(score)
    assert scores.tolist() == [1.0, 2.5] and scores.dtype == torch.float32
    assert scored(lambda *_: np.array([1.0, 2.0])).tolist() == scored(lambda *_: torch.tensor([1, 2])).tolist()


def test_a_signal_in_a_users_function_is_no_fault_of_it():
    def stopped(*_):
        raise SignalExit(143)

    with pytest.raises(SignalExit):
        scored(stopped)


def boom(prompts, responses, rows):
    return rows[0]["absent"]


@pytest.mark.parametrize(("function", "message"), [
    (lambda *_: [1.0], "returned 1 numbers for 2 responses"),
    (lambda *_: None, "returned NoneType None; a list of 2 numbers"),
    (lambda *_: ["good", "bad"], "returned list .*; a list of 2 numbers"),
    (lambda *_: {0: 1.0, 1: 2.0}, "returned dict .*; a list of 2 numbers"),
    (lambda *_: "12", "returned str '12'; a list of 2 numbers"),
    (lambda *_: sys.exit(3), r"raised SystemExit: 3 \(.*test_reward.py:\d+\)"),
    (lambda *_: [1.0, math.inf], "the score of 1 of 2 responses is not a finite number, the first inf for 'r1'"),
    (lambda *_: [math.nan, math.nan], "the score of 2 of 2 responses"),
    (boom, r"raised KeyError: 'absent' \(.*test_reward.py:\d+\)"),
], ids=["short", "none", "texts", "dict", "text", "exits", "infinite", "nan", "raises"])  # fmt: skip
def test_what_is_no_score_is_refused(function, message):
    with pytest.raises(TrainingError, match="^reward_function rules:score: " + message):
        scored(function)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder; sys.path and sys.modules are put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def test_functions_are_found_in_the_current_folder_with_their_neighbours(place):
    (place / "rules_here.py").write_text(
        "def score(prompts, responses, rows):\n    import beside\n    return beside.lengths(responses)\n"
    )
    (place / "beside.py").write_text("def lengths(texts):\n    return [len(text) for text in texts]\n")
    assert scored(load_function("rules_here:score")).tolist() == [2, 2]


@pytest.mark.parametrize(("name", "message"), [
    ("rules_gone:score", "there is no module 'rules_gone' in .*here; write rules_gone.py there"),
    ("rules_gone.py:score", "there is no module .rules_gone. in .*; leave .py out: rules_gone:score"),
    ("broken:score", r"importing it raised ZeroDivisionError: .* \(.*broken.py:2\)"),
    ("leaves:score", r"importing it raised SystemExit: 5 \(.*leaves.py:2\)"),
    ("needs:score", "importing it raised ModuleNotFoundError: No module named 'not_installed'"),
    ("plain:nothing", r"module 'plain' \(.*plain.py\) has no 'nothing'"),
    ("plain:number", r"module 'plain' \(.*plain.py\) has no function 'number'"),
])  # fmt: skip
def test_functions_that_cannot_be_had_are_named(place, name, message):
    (place / "broken.py").write_text("x = 1\ny = x / 0\n")
    (place / "leaves.py").write_text("import sys\nsys.exit(5)\n")
    (place / "needs.py").write_text("import not_installed\n")
    (place / "plain.py").write_text("number = 3\n")
    with pytest.raises(ConfigError, match=f"^reward_function: '{name}': {message}"):
        load_function(name)


# --- it learns ---


def test_a_few_steps_raise_the_accuracy_on_held_out_pairs(tiny):
    """Chosen responses are made of eight tokens, rejected ones of eight others, prompts of any."""
    generator = torch.Generator().manual_seed(11)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    pairs = []
    for _ in range(56):
        prompt = draw(20, 270, 4)
        pairs += documents(([*prompt, *draw(20, 28, 5), 1], 4), ([*prompt, *draw(150, 158, 5), 1], 4))
    train, held_out = pairs[:40], collate_pairs(pairs[40:])
    model, head = load_base(tiny), RewardHead(D, torch.Generator().manual_seed(2))
    inject(model, LoraSpec(8, 16.0), torch.Generator().manual_seed(0))
    objective = reward_objective(head)
    optimizer = torch.optim.AdamW([p for p in (*model.parameters(), *head.parameters()) if p.requires_grad], lr=1e-2)

    def held_out_metrics():
        with torch.no_grad():
            total, count, metrics = objective.sums(model, held_out)
        return float(total) / count, metrics["reward_accuracy"] / count

    before = held_out_metrics()
    for step in range(30):
        start = step % 5 * 8
        loss = objective.loss(model, collate_pairs(train[start : start + 8]))
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_metrics()
    assert before[1] < 0.8 and after[1] >= 0.9 and after[0] < 0.6 * before[0]
