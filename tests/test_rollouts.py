"""Rollouts: what is sampled, with which probability, and where it ends."""

import math

import pytest
import torch

from mini_forge.data.chat import choose_template
from mini_forge.data.tasks import Pair
from mini_forge.data.tokenizer import load_tokenizer
from mini_forge.errors import TrainingError
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.training.rollouts import Prompt, Sampling, encode_prompts, sample_responses, sample_rollouts
from tests.fake_model import TableModel, chain, says
from tests.tiny import random_model

HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [[5, 9, 14, 22, 7], [30], [41, 42, 43]]


@pytest.fixture(scope="module")
def model():
    """With an adapter that does something, and dropout that must not."""
    model = random_model()
    generator = torch.Generator().manual_seed(1)
    inject(model, LoraSpec(4, 8, dropout=0.5), generator)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(0, 0.3, generator=generator)
    return model.train()


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampling(limit: int = 12, temperature: float = 1.0, stops=(), **others) -> Sampling:
    return Sampling(limit, temperature, frozenset(stops), **others)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_log_probabilities_are_those_of_a_fresh_forward_pass(model, temperature):
    rows = sample_responses(model, PROMPTS, sampling(20, temperature, stops=range(100, 140)), draws())
    assert len({len(ids) for ids, _ in rows}) > 1  # ended at different places
    model.eval()
    for prompt, (ids, logps) in zip(PROMPTS, rows, strict=True):
        with torch.no_grad():
            logits = model.logits(torch.tensor([[*prompt, *ids]]))[0].double() / temperature
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps).double(), expected, atol=1e-5, rtol=0)
    model.train()


def test_the_model_is_left_in_training_and_without_gradients(model):
    sample_responses(model, PROMPTS, sampling(2), draws())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_draws_follow_the_softmax_at_the_temperature():
    """Logits 0, ln 4 at T = 2: probabilities 1/3 and 2/3. 6000 draws: a deviation of 0.6 %, checked to four of them."""
    table = TableModel(torch.tensor([[0.0, math.log(4.0)], [0.0, math.log(4.0)]]))
    table.head = lambda hidden: hidden.new_tensor([[0.0, math.log(4.0) / 2]]).expand(len(hidden), -1)
    rows = sample_responses(table, [[0]] * 60, sampling(100, 2.0), draws())
    ids = torch.tensor([ids for ids, _ in rows])
    assert float(ids.float().mean()) == pytest.approx(2 / 3, abs=0.025)
    logps = torch.tensor([logps for _, logps in rows])
    torch.testing.assert_close(logps.exp(), torch.where(ids == 1, 2 / 3, 1 / 3))


def test_nothing_is_cut_from_the_distribution():
    """256 equally likely ids: plain sampling finds them all."""
    rows = sample_responses(TableModel(torch.zeros(256, 256)), [[0]] * 40, sampling(100), draws())
    assert len({token for ids, _ in rows for token in ids}) == 256


def test_a_stop_token_ends_its_row_and_belongs_to_it():
    model = says(2, [3, 4, 1, 5, 6], size=8)
    [(ids, logps)] = sample_responses(model, [[2, 2]], sampling(10, stops=[1]), draws())
    assert ids == [3, 4, 1] and len(logps) == 3
    assert len(model.calls) == 3  # prompt, 3, 4: nothing is computed after the end


def test_a_row_without_a_stop_token_has_all_its_tokens():
    [(ids, _)] = sample_responses(chain(4, _0=2, _2=2), [[0]], sampling(5, stops=[1]), draws())
    assert ids == [2, 2, 2, 2, 2]


def test_an_end_that_is_spelled_ends_a_row_too():
    ended = sampling(9, is_ended=lambda tokens: tokens[-2:] == [4, 5])
    [(ids, _)] = sample_responses(says(1, [3, 4, 5, 6, 7], size=8), [[2]], ended, draws())
    assert ids == [3, 4, 5]


def test_the_seed_decides_the_draws(model):
    first, again, other = (sample_responses(model, PROMPTS, sampling(), draws(seed)) for seed in (3, 3, 4))
    assert first == again and first != other


def test_a_rollout_has_its_prompt_text_and_row(model, tiny):
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode("<|im_start|>hello")
    prompt = Prompt(ids, tokenizer.decode(ids), {"prompt": "hello", "answer": 7}, 3)
    stops = tokenizer.encode("<|im_end|>")
    rollouts = sample_rollouts(model, [prompt] * 5, tokenizer, sampling(8, stops=stops), draws(), batch_size=2)
    assert len(rollouts) == 5
    at_once = sample_rollouts(model, [prompt] * 2, tokenizer, sampling(8, stops=stops), draws())
    assert [r.response_ids for r in at_once] == [r.response_ids for r in rollouts[:2]]
    for rollout in rollouts:
        assert (rollout.prompt_ids, rollout.prompt, rollout.row, rollout.line) == (ids, "hello", prompt.row, 3)
        assert rollout.response == tokenizer.decode(rollout.response_ids) and len(rollout.logps) <= 8
    assert len({tuple(rollout.response_ids) for rollout in rollouts}) == 5


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(TrainingError, match="rollouts: the policy's logits are not finite .* lower learning_rate"):
        sample_responses(TableModel(torch.full((4, 4), math.nan)), [[0]], sampling(), draws())


def test_prompts_are_cut_on_the_left_to_leave_room(tiny):
    tokenizer = load_tokenizer(tiny)
    template = choose_template(None, str(tiny), tokenizer, "text-generation")
    pairs = [Pair(({"role": "user", "content": text},), line=i, file="f") for i, text in enumerate(("hi", "x" * 90), 1)]
    prompts, cut = encode_prompts(pairs, {1: {"a": 1}, 2: {"a": 2}}, template, tokenizer, 40)
    assert cut == 1 and [len(p.ids) for p in prompts] == [len(tokenizer.encode(HI)), 40]
    assert tokenizer.decode(prompts[0].ids, skip_special=False) == HI and prompts[0].row == {"a": 1}
    assert prompts[1].text.startswith("xxx") or prompts[1].ids[0] == tokenizer.bos_id
    assert prompts[1].text.endswith("xxx\nassistant\n")
