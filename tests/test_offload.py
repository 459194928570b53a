"""Checkpoints in host memory: the gradients of recompute "full", and nothing of the stream left on the device."""

import gc
import weakref

import pytest
import torch

from mini_forge.config import Machine, TrainingConfig, resolve
from mini_forge.errors import ConfigError
from mini_forge.model.experts import balance_loss
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.model.offload import HostCopies
from tests.tiny import random_model
from tests.tiny_experts import CONFIGS as EXPERTS
from tests.tiny_experts import SHARED

EXPERT = {**SHARED, **EXPERTS["qwen3_moe"], "num_hidden_layers": 3, "output_router_logits": True,
          "router_aux_loss_coef": 0.1}  # fmt: skip
CONFIGS = [{"num_hidden_layers": 4}, {"model_type": "phi3"}, EXPERT, {**SHARED, **EXPERTS["llama4_text"]}]
ROWS = torch.tensor([3, 9, 10, 18])
TREE = {"document": torch.tensor([[0] * 8 + [1] * 5 + [2] * 7]), "parents": (-1, 0, 0)}


class LateCopies(HostCopies):
    """Each transfer takes as long as it may: it happens when it is waited for, from and to memory that must still be
    there, and until then there is nonsense where it goes."""

    def __init__(self):
        super().__init__()
        self.under_way = 0

    def _start(self, source, target, device):
        assert self.under_way == 0, "nobody has waited for the transfer before"
        self.under_way += 1
        self.source, self.target = weakref.ref(source), weakref.ref(target)
        target.fill_(float("nan"))
        return self._end

    def _end(self):
        assert self.source() is not None and self.target() is not None, "given up under way"
        self.target().copy_(self.source())
        self.under_way -= 1


def trainable(config, recompute, device="cpu", dropout=0.3):
    model = random_model(**config).train()
    inject(model, LoraSpec(2, 4, dropout=dropout), torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(i))
    model.recompute = recompute
    return model.to(device)


def step(model, **arguments):
    """Two microbatches and their gradients, added up; then the state of the generator, and how many routings."""
    torch.manual_seed(5)
    found = []
    for ids in (torch.arange(20), torch.arange(40, 60)):
        states = model(ids[None].to(model.device), **arguments)
        total = states.square().sum()
        if model.routings and model.routings[0].probability is not None:
            total = total + 1e3 * balance_loss(model.routings)
        total.backward()
        found += [states.detach(), torch.tensor(len(model.routings))]
    return [*found, torch.get_rng_state(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("arguments", [{}, {"rows": ROWS}, TREE, {**TREE, "rows": ROWS}],
                         ids=["plain", "rows", "parents", "both"])  # fmt: skip
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.get("model_type", "llama"))
@pytest.mark.parametrize("copies", [HostCopies, LateCopies])
def test_gradients_are_those_of_full_to_the_bit(copies, config, arguments):
    expected = step(trainable(config, "full"), **arguments)
    model = trainable(config, "offload")
    model._host_copies = copies()
    found = step(model, **arguments)
    assert len(found) == len(expected) and all(x is not None for x in expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_balance_loss_reaches_the_adapters_through_recomputed_layers():
    """So that the test above is one of it: without the balance loss gradients differ."""
    with_balance, without = (step(trainable({**EXPERT, **more}, "offload"))[5:]
                             for more in ({}, {"router_aux_loss_coef": 0.0}))  # fmt: skip
    assert any(not torch.equal(a, b) for a, b in zip(with_balance, without, strict=True))


def block_inputs(model) -> list[weakref.ref]:
    """A weak reference to the storage of what each block is given in the forward, filled as it runs."""
    seen = []

    def remember(block, arguments):
        if len(seen) < len(model.model.layers):
            seen.append(weakref.ref(arguments[0].untyped_storage()))

    for block in model.model.layers:
        block.register_forward_pre_hook(remember)
    return seen


@pytest.mark.parametrize(("recompute", "alive"), [("full", 4), ("offload", 1)])
def test_the_stream_leaves_the_device(recompute, alive):
    """Between forward and backward "full" keeps the input of every block, "offload" that of the last alone, which is
    wanted first."""
    model = trainable({"num_hidden_layers": 4}, recompute)
    inputs = block_inputs(model)
    total = model(torch.arange(20)[None]).sum()
    gc.collect()
    there = [storage() is not None for storage in inputs]
    assert there == [False] * (4 - alive) + [True] * alive
    total.backward()


def test_one_is_fetched_ahead_and_nothing_stays_behind():
    copies = HostCopies()
    tensors = [torch.full((3,), float(i)) for i in range(4)]
    handles = [copies.put(t.clone()) for t in tensors]
    for i in (3, 2, 1, 0):
        assert torch.equal(copies.get(handles[i]), tensors[i])
        assert (copies._transfer.copy is handles[i - 1]) if i else (copies._transfer is None)
    for i in (1, 1, 3, 0):  # again, and in another order
        assert torch.equal(copies.get(handles[i]), tensors[i])
    gone = [weakref.ref(handle) for handle in handles]
    copies.get(handles[0])
    del handles
    assert [handle() for handle in gone] == [None] * 4
    assert copies.get(copies.put(tensors[1])) is not None and copies._transfer is None  # those before are gone


def test_a_copy_is_of_its_own_storage():
    x = torch.ones(4, requires_grad=True)
    handle = HostCopies().put(x)
    assert handle.host.data_ptr() != x.data_ptr() and not handle.host.requires_grad


def test_a_graph_that_is_kept_can_be_gone_through_twice():
    model = trainable({"num_hidden_layers": 3}, "offload")
    total = model(torch.arange(20)[None]).square().sum()
    leaves = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, leaves), strict=True):
        assert torch.equal(a, b)


def test_evaluation_copies_nothing():
    model = trainable({}, "offload")
    model._host_copies = None
    with torch.no_grad():
        model(torch.arange(20)[None])
    model.eval()(torch.arange(20)[None])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.get("model_type", "llama"))
def test_on_a_gpu_copies_are_pinned_and_gradients_those_of_full(config):
    expected = step(trainable(config, "full", "cuda"))
    model = trainable(config, "offload", "cuda")
    for a, b in zip(step(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model._host_copies.put(torch.ones(3, device="cuda")).host.is_pinned()


def config_of(**keys) -> TrainingConfig:
    first = {"task": "text-generation", "model_name": "m", "dataset": "d.jsonl", "compute_specs": "low_end"}
    return TrainingConfig.from_dict({**first, "recompute": "offload", **keys})


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_without_memory_of_its_own_is_refused(device):
    with pytest.raises(ConfigError, match=f'recompute: "offload" needs device "cuda" .this run is on {device}.*"full"'):
        resolve(config_of(), Machine(device))
    resolve(config_of(), Machine("cuda", True, 2**36, 2**34))
    resolve(config_of(gradient_checkpointing=False), Machine(device))  # then it has no effect
