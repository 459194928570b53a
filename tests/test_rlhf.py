"""PPO and GRPO on a model of two layers: what an update learns from, what it tells, and where it goes on."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from mini_forge.data.batches import collate
from mini_forge.data.tokenizer import load_tokenizer
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.training.optim import load_optimizer_state, make_optimizer, optimizer_state
from mini_forge.training.ppo_loop import PPO
from mini_forge.training.ppo_math import kl_k3
from mini_forge.training.reward import function_scorer
from mini_forge.training.rlhf import (
    PPOSettings,
    ValueHead,
    document_of,
    evaluate_policy,
    experience_of,
    microbatches,
    minibatches,
    padded,
    policy_outputs,
    ppo_loss,
)
from mini_forge.training.rollouts import Prompt, Rollout, Sampling, sample_rollouts
from tests.tiny import random_model

SETTINGS = PPOSettings(
    total_steps=3, steps_per_epoch=1, eval_steps=2, save_steps=None, logging_steps=1, rollout_batch_size=6,
    micro_batch_size=2, ppo_epochs=2, num_mini_batches=2, learning_rate=2e-2, schedule="constant", warmup_steps=0,
    max_grad_norm=1.0, kl_coef=0.05,
)  # fmt: skip
SAMPLING = Sampling(max_new_tokens=10, temperature=0.9, stop_ids=frozenset(range(100, 120)))


def policy(seed: int = 1, deviation: float = 0.0, sharpness: float = 1.0):
    """The tiny model with LoRA; its B at zero, or drawn, as after some training. sharpness: of the head, by which
    hidden states can choose between tokens."""
    model = random_model()
    model.lm_head.weight.data.mul_(sharpness)
    generator = torch.Generator().manual_seed(seed)
    inject(model, LoraSpec(4, 8), generator)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(0, deviation or 1.0, generator=generator).mul_(bool(deviation))
    return model.requires_grad_(False).train(), [
        p.requires_grad_() for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B)
    ]


def prompts(count: int = 6) -> list[Prompt]:
    return [Prompt([5 + i, *range(30, 34 + i)], f"prompt {i}", {"number": i}, i + 1) for i in range(count)]


def ppo(tiny, settings=SETTINGS, reward=None, evaluate=None, seed: int = 1, sharpness: float = 1.0, **others) -> PPO:
    model, parameters = policy(seed, sharpness=sharpness)
    head = None if settings.is_grouped else ValueHead(32)
    parameters += [] if head is None else list(head.parameters())
    reward = reward or (lambda prompts, responses, rows: [float(len(r)) / 10 for r in responses])
    options = dict(
        scaler=None, prompts=prompts(), tokenizer=load_tokenizer(tiny), sampling=SAMPLING,
        score=function_scorer(reward), save=lambda progress: None, on_step=lambda step, total: None,
    )  # fmt: skip
    loop = PPO(
        settings=settings, model=model, value_head=head, parameters=parameters,
        optimizer=make_optimizer("adamw_torch", parameters, settings.learning_rate, 0.0, "cpu"),
        evaluate=evaluate, log=None, log_sample=None, **{**options, **others},
    )  # fmt: skip
    loop.lines, loop.samples = [], []
    loop.log, loop.log_sample = loop.lines.append, loop.samples.append
    return loop


def test_a_microbatch_says_of_each_response_what_it_says_alone():
    """Whatever the prompts begin with: 5 and 7 in turn, with a shared beginning too short to be computed once, or one
    that is."""
    model, _ = policy(deviation=0.5)
    for beginning in ([], [9] * 20):
        prompts = [[*beginning, 5 + 2 * (i % 2), 6] for i in range(5)]
        documents = [
            document_of(Rollout(prompt, [10 + i, 20, 30 + i], "", "", {}, i, [0.0] * 3))
            for i, prompt in enumerate(prompts)
        ]
        alone = torch.cat([policy_outputs(model, collate([document]), 1.0)[0] for document in documents])
        batch = collate(documents, share_prefixes=True)
        assert (batch.parents is not None) == bool(beginning)
        torch.testing.assert_close(policy_outputs(model, batch, 1.0)[0], alone, rtol=1e-5, atol=1e-5)


def rollouts_of(model, tiny, count: int = 6, seed: int = 0):
    return sample_rollouts(model, prompts(count), load_tokenizer(tiny), SAMPLING, torch.Generator().manual_seed(seed))


def experienced(tiny, settings=SETTINGS, deviation: float = 0.3):
    """A policy away from its reference, a value head that says something, and their experience."""
    model, parameters = policy(deviation=deviation)
    head = None if settings.is_grouped else ValueHead(32)
    if head is not None:
        head.value.weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
    rollouts = rollouts_of(model, tiny)
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
    return model, parameters, head, rollouts, experience_of(model, head, rollouts, scores, settings, 0.9, 0.05)


def test_the_first_minibatch_of_the_first_epoch_has_ratios_of_exactly_1(tiny):
    model, _, head, _, experience = experienced(tiny)
    rows = minibatches(6, SETTINGS, 0, 0)[0]
    for part in microbatches(rows, SETTINGS):
        _, sums = ppo_loss(model, head, experience, part, SETTINGS, 0.9, 0.05)
        tokens = int(experience.is_response[list(part)].sum())
        assert sums["ratio_mean"].item() == tokens
        assert sums["approx_kl"].item() == sums["clip_fraction"].item() == 0


def test_the_experience_is_that_of_a_plain_forward_pass(tiny):
    """Each response alone, without packing, from full logits in float64; the reference is the model without LoRA."""
    model, _, head, rollouts, experience = experienced(tiny)
    bare = random_model()
    for i, rollout in enumerate(rollouts):
        ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]]), len(rollout.prompt_ids)
        n = len(rollout.response_ids)
        with torch.no_grad():
            for net, found in ((model, experience.logps), (bare, experience.ref_logps)):
                chances = (net.logits(ids)[0].double() / 0.9).log_softmax(-1)[start - 1 : -1]
                expected = chances.gather(-1, ids[0, start:, None])[:, 0]
                torch.testing.assert_close(found[i, :n].double(), expected, atol=1e-5, rtol=0)
            values = model(ids)[0, start - 1 : -1] @ head.value.weight[0]
        torch.testing.assert_close(experience.values[i, :n], values, atol=1e-5, rtol=0)
        assert experience.is_response[i].tolist() == [j < n for j in range(experience.is_response.shape[1])]
        for name in ("logps", "ref_logps", "values", "advantages", "returns"):
            assert not getattr(experience, name)[i, n:].any()


def test_a_fresh_adapter_is_its_reference_bit_for_bit(tiny):
    *_, experience = experienced(tiny, deviation=0.0)
    assert torch.equal(experience.logps, experience.ref_logps)


def test_a_minibatch_weighs_tokens_the_same_whatever_its_microbatches(tiny):
    """The gradient of all six rollouts at once is that of two at a time, though their lengths differ."""
    gradients = []
    for size in (6, 2, 1):
        settings = replace(SETTINGS, micro_batch_size=size)
        loop = ppo(tiny, settings)
        experience = experience_of(
            loop.model, loop.value_head, rollouts_of(loop.model, tiny), torch.randn(6, generator=torch.manual_seed(3)),
            settings, 0.9, 0.05,
        )  # fmt: skip
        assert len(set(experience.is_response.sum(-1).tolist())) > 2
        loop._backward(experience, range(6))
        gradients.append([p.grad.clone() for p in loop.parameters])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_the_loss_is_its_parts_token_by_token(tiny):
    """The loss of a policy that has moved since the rollouts, from the ratios and values of plain forward passes."""
    model, parameters, head, rollouts, experience = experienced(tiny)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.sign(parameter)
    total, sums = ppo_loss(model, head, experience, range(6), SETTINGS, 0.9, 0.05)
    policy_sum = value_sum = squares = 0.0
    for i, rollout in enumerate(rollouts):
        ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]]), len(rollout.prompt_ids)
        with torch.no_grad():
            chances = (model.logits(ids)[0] / 0.9).log_softmax(-1)[start - 1 : -1].gather(-1, ids[0, start:, None])
            values = (model(ids)[0, start - 1 : -1] @ head.value.weight[0]).tolist()
        for t, (chance, value) in enumerate(zip(chances[:, 0].tolist(), values, strict=True)):
            old, old_value, a, r = (
                float(getattr(experience, name)[i, t]) for name in ("logps", "values", "advantages", "returns")
            )
            ratio = math.exp(chance - old)
            squares += (chance - old) ** 2
            policy_sum += max(-ratio * a, -min(max(ratio, 0.8), 1.2) * a)
            held = old_value + min(max(value - old_value, -0.2), 0.2)
            value_sum += 0.5 * max((value - r) ** 2, (held - r) ** 2)
    assert sums["clip_fraction"] > 0
    assert sums["approx_kl"].item() == pytest.approx(squares / 2, rel=1e-3)
    assert sums["policy_loss"].item() == pytest.approx(policy_sum, rel=1e-4, abs=1e-4)
    assert sums["value_loss"].item() == pytest.approx(value_sum, rel=1e-4)
    assert total.item() == pytest.approx(policy_sum + 0.1 * value_sum, rel=1e-4, abs=1e-4)


def test_advantages_are_whitened_over_the_response_tokens(tiny):
    *_, experience = experienced(tiny)
    tokens = experience.advantages[experience.is_response].double()
    assert abs(tokens.mean()) < 1e-6 and tokens.var().item() == pytest.approx(1, abs=1e-5)
    assert experience.returns.std() > 0.1 and not torch.allclose(experience.returns, experience.advantages)


def test_groups_have_no_values_and_their_penalty_in_the_loss(tiny):
    settings = replace(SETTINGS, advantage="group", group_size=3)
    model, parameters, head, rollouts, experience = experienced(tiny, settings)
    assert head is None and not experience.values.any() and not experience.returns.any()
    spread = math.sqrt((0**2 + 1.5**2 + 1.5**2) / 2) + 1e-4  # of 0.5, -1, 2, whose mean is 0.5
    for row, expected in zip(range(3), (0, -1.5 / spread, 1.5 / spread), strict=True):
        found = experience.advantages[row][experience.is_response[row]]
        torch.testing.assert_close(found, torch.full_like(found, expected))
    total, sums = ppo_loss(model, head, experience, range(6), settings, 0.9, 0.5)
    penalty = kl_k3(experience.logps, experience.ref_logps)[experience.is_response].sum()
    assert "value_loss" not in sums
    assert (total - sums["policy_loss"]).item() == pytest.approx(0.5 * penalty.item(), rel=1e-5)
    assert penalty > 1


def test_minibatches_cover_every_rollout_once_an_epoch_in_another_order_each_time():
    plans = [minibatches(7, SETTINGS, update, epoch) for update in range(2) for epoch in range(3)]
    for plan in plans:
        assert sorted(i for rows in plan for i in rows) == list(range(7)) and [len(rows) for rows in plan] == [4, 3]
    assert plans[0] == plans[3] == [[0, 1, 2, 3], [4, 5, 6]]
    assert len({str(plan) for plan in (plans[1], plans[2], plans[4], plans[5])}) == 4
    assert minibatches(1, SETTINGS, 0, 0) == [[0]]  # a last, short update
    assert list(microbatches([3, 1, 4, 0, 2], SETTINGS)) == [[3, 1], [4, 0], [2]]


def test_an_epoch_asks_every_prompt_once_and_a_group_is_of_one_prompt(tiny):
    loop = ppo(tiny, replace(SETTINGS, rollout_batch_size=4, steps_per_epoch=2))
    asked = [[p.line for p in loop.prompts_of(update)] for update in range(4)]
    assert [len(lines) for lines in asked] == [4, 2, 4, 2]
    assert sorted(asked[0] + asked[1]) == sorted(asked[2] + asked[3]) == [1, 2, 3, 4, 5, 6]
    assert asked[0] != asked[2]
    loop = ppo(tiny, replace(SETTINGS, rollout_batch_size=4, steps_per_epoch=3, advantage="group", group_size=2))
    lines = [p.line for p in loop.prompts_of(0)]
    assert lines[0] == lines[1] != lines[2] == lines[3]


def counted(prompts, responses, rows):
    """How many letters a response has: of random bytes, one in five."""
    return [sum(c.isascii() and c.isalpha() for c in response) for response in responses]


@pytest.mark.parametrize("changes", [{}, {"advantage": "group", "group_size": 4}], ids=["gae", "group"])
def test_the_mean_reward_rises_within_a_dozen_updates(tiny, changes):
    settings = replace(
        SETTINGS, total_steps=12, rollout_batch_size=32, micro_batch_size=16, num_mini_batches=2, ppo_epochs=4,
        kl_coef=0.01, learning_rate=1e-2, **changes,
    )  # fmt: skip
    loop = ppo(tiny, settings, counted, prompts=prompts(32), sampling=replace(SAMPLING, temperature=1.0), sharpness=6)
    loop.run()
    rewards, kls = [line["reward_mean"] for line in loop.lines], [line["kl"] for line in loop.lines]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 1.0, rewards
    assert kls[0] == 0 and all(math.isfinite(kl) and kl >= 0 for kl in kls) and kls[-1] > 0
    assert all(line["logp_gap"] < 1e-4 for line in loop.lines)
    assert all(math.isfinite(v) for line in loop.lines for v in line.values())


def test_an_update_tells_what_it_did_and_shows_some_rollouts(tiny):
    loop = ppo(tiny)
    loop.run()
    told = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds",
            "peak_memory_bytes", "reward_mean", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction",
            "approx_kl", "ratio_mean", "response_tokens", "kl_coef", "optimizer_steps"}  # fmt: skip
    assert [line["step"] for line in loop.lines] == [1, 2, 3] and all(line.keys() >= told for line in loop.lines)
    assert all(line["optimizer_steps"] == 4 for line in loop.lines)
    assert len(loop.samples) == 12 and loop.samples[0].keys() == {"step", "prompt", "response", "reward", "kl"}
    for sample in loop.samples:
        assert sample["reward"] == pytest.approx(len(sample["response"]) / 10)
    json.dumps([loop.lines, loop.samples], allow_nan=False)


def test_lines_are_means_of_the_updates_since_the_last(tiny):
    every, some = ppo(tiny), ppo(tiny, replace(SETTINGS, logging_steps=3))
    every.run(), some.run()
    assert [line["step"] for line in some.lines] == [1, 3]
    expected = (every.lines[1]["reward_mean"] + every.lines[2]["reward_mean"]) / 2
    assert some.lines[1]["reward_mean"] == pytest.approx(expected, abs=1e-12)


def test_an_update_stops_where_the_policy_has_gone_too_far(tiny):
    free, held = ppo(tiny), ppo(tiny, replace(SETTINGS, target_kl=1e-9))
    free.run(), held.run()
    assert [line["optimizer_steps"] for line in free.lines] == [4, 4, 4]
    assert [line["optimizer_steps"] for line in held.lines] == [1, 1, 1]  # the first has ratios of 1
    assert all(not p.grad.any() for p in held.parameters)


def test_the_penalty_adapts_only_where_a_target_is_given(tiny):
    fixed, adaptive = ppo(tiny), ppo(tiny, replace(SETTINGS, kl_target=1e-6))
    fixed.run(), adaptive.run()
    assert [line["kl_coef"] for line in fixed.lines] == [0.05] * 3
    # KL is 0 at first: an error of -0.2; then far above the target: 0.2
    expected = [0.05, 0.05 * 0.98, 0.05 * 0.98 * 1.02]
    assert [line["kl_coef"] for line in adaptive.lines] == pytest.approx(expected)


def test_the_rate_follows_the_schedule_by_optimizer_steps(tiny):
    loop = ppo(tiny, replace(SETTINGS, schedule="linear", warmup_steps=2))
    assert [loop._learning_rate(0, i) for i in range(3)] == pytest.approx([0, 0.01, 0.02])
    assert loop._learning_rate(2, 3) == pytest.approx(0.02 * 0.1)  # step 11 of 12: 1/10 of the way is left


def states(loop: PPO) -> dict:
    return copy.deepcopy(
        {
            "loop": loop.state(),
            "optimizer": optimizer_state(loop.optimizer),
            "weights": [p.data for p in loop.parameters],
        }
    )


@pytest.mark.parametrize("changes", [{"kl_target": 0.01}, {"advantage": "group", "group_size": 2}], ids=str)
def test_a_run_goes_on_bit_for_bit(tiny, changes):
    settings = replace(SETTINGS, total_steps=4, save_steps=2, logging_steps=3, **changes)
    whole = ppo(tiny, settings)
    kept = []
    whole.save = lambda progress: kept.append(states(whole))
    whole.run()
    resumed = ppo(tiny, settings, seed=7)
    for parameter, saved in zip(resumed.parameters, kept[0]["weights"], strict=True):
        parameter.data.copy_(saved)
    load_optimizer_state(resumed.optimizer, kept[0]["optimizer"])
    resumed.restore(kept[0]["loop"])
    assert resumed.progress.step == 2
    resumed.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))
    timings = ("seconds", "tokens_per_second", "peak_memory_bytes")
    last, again = ({k: v for k, v in loop.lines[-1].items() if k not in timings} for loop in (whole, resumed))
    assert last == again and resumed.samples == whole.samples[8:]


def test_evaluation_draws_the_same_each_time_and_tells_reward_and_kl(tiny):
    model, _ = policy(deviation=0.3)
    score = function_scorer(lambda prompts, responses, rows: [row["number"] for row in rows])
    arguments = (prompts(), load_tokenizer(tiny), SAMPLING, score, 5, 4)
    (first, samples), (again, _) = (evaluate_policy(model, *arguments) for _ in range(2))
    assert first == again and first["eval_reward_mean"] == 2.5 and first["eval_rows"] == 6
    assert first["eval_kl"] > 0 and len(samples) == 6
    documents = [document_of(r) for r in rollouts_of(model, tiny)]
    assert documents[0].is_trained[-1] and not documents[0].is_trained[0]


def test_it_is_evaluated_before_the_first_update_every_so_many_and_at_the_end(tiny):
    loop = ppo(tiny, evaluate=lambda: {"eval_reward_mean": 1.0})
    loop.run()
    assert [line["step"] for line in loop.lines if "eval_reward_mean" in line] == [0, 2, 3]


def test_padding_is_zero_and_gradients_come_back_from_the_tokens_alone():
    is_response = torch.tensor([[True, True, False], [True, False, False]])
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    table = padded(flat, is_response)
    assert table.tolist() == [[1, 2, 0], [3, 0, 0]]
    (table * torch.tensor([[1.0, 2, 9], [3, 9, 9]])).sum().backward()
    assert flat.grad.tolist() == [1, 2, 3]


def test_the_value_head_begins_at_zero_in_float32():
    values = ValueHead(8)(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert values.dtype == torch.float32 and values.shape == (2, 3) and not values.any()


def test_without_a_head_there_are_no_values(tiny):
    model, _ = policy()
    from mini_forge.data.batches import collate

    batch = collate([document_of(rollout) for rollout in rollouts_of(model, tiny, 2)])
    logps, values = policy_outputs(model, batch, 1.0)
    assert logps.shape == values.shape and not values.any()


def test_every_update_draws_anew(tiny):
    """One prompt and a policy that hardly moves: the same draws would give the same responses."""
    loop = ppo(tiny, replace(SETTINGS, learning_rate=1e-12), prompts=prompts(1))
    loop.run()
    assert len({sample["response"] for sample in loop.samples}) == len(loop.samples) == 3
