"""Fused = plain: for every family and every storage of its frozen weights the loss and each adapter's gradient, and for
whole runs every step, killed or not. Both are held against the formulas differentiated by autograd."""

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import mini_forge
from mini_forge.data.batches import Document, collate
from mini_forge.data.pairs import PairDocument, collate_pairs
from mini_forge.io.weights import load_base
from mini_forge.model import decoder, low_rank
from mini_forge.model.experts import Router
from mini_forge.model.lora import LoRALinear, LoraSpec, LoRAStack, inject, lora_layers, project
from mini_forge.model.ops import PLAIN
from mini_forge.model.quant import Linear4bit, Linear8bit, Linear16bit, dequantized_weight
from mini_forge.model.stacks import Stack4bit, Stack8bit, StackMxfp4, expert_weight
from mini_forge.providers import PROVIDERS
from mini_forge.training.dpo import preference_objective
from mini_forge.training.losses import LossSum
from mini_forge.training.preferences import LossOptions
from mini_forge.training.sft import sft_loss
from mini_forge_kernels import attention
from mini_forge_kernels import low_rank as compiled_low_rank
from tests import golden_files as golden
from tests.tiny import write_rows
from tests.tiny_experts import write_checkpoint

STORAGES = {
    "dense": {},
    "bfloat16": {},
    "nf4": {"quantization": "nf4"},
    "nf4_nested": {"quantization": "nf4", "nested": True},
    "int8": {"quantization": "int8"},
}
STORED_IN = {
    "dense": nn.Linear, "bfloat16": Linear16bit, "nf4": Linear4bit, "nf4_nested": Linear4bit, "int8": Linear8bit,
}  # fmt: skip
STACKED_IN = {
    "dense": nn.Parameter, "bfloat16": nn.Parameter, "nf4": Stack4bit, "nf4_nested": Stack4bit, "int8": Stack8bit,
}  # fmt: skip


def kind(name):
    return json.loads((golden.family(name)[0] / "config.json").read_text())["model_type"]


MXFP4 = "gpt_oss_mxfp4"  # its experts stay in MXFP4, however the rest is stored
ONE_OF_EACH = list({kind(name): name for name in golden.FAMILIES}.values())
CASES = [(name, storage) for name in golden.FAMILIES for storage in ("dense", "bfloat16")]
CASES += [(name, storage) for name in (*ONE_OF_EACH, MXFP4) for storage in ("nf4", "int8")]
CASES += [("llama_tied_bias", "nf4_nested"), ("qwen3_moe_hub", "nf4_nested")]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
RECOMPUTE = (None, "selective", "full")


def document(prompt, response):
    ids = np.array([*prompt, *response], dtype=np.int32)
    return Document(ids, np.arange(len(ids)) >= len(prompt), line=1)


# The families' windows and chunks are of 5 to 8 tokens: documents of 1 token and of 4, and of 12 to 37, of which three
# share a beginning, and two of these some more.
SYSTEM, ASK, OTHER = list(range(20, 37)), list(range(3, 20)), list(range(39, 44))
DOCUMENTS = [
    document(SYSTEM + ASK, [1, 2, 3]),
    document([9], [7]),
    document(SYSTEM + OTHER, [4, 17]),
    document([5, 8, 2], [40, 6]),
    document([46], range(30, 7, -2)),
    document(SYSTEM + ASK, [5, 6, 45, 44]),
]
PAIRS = [PairDocument(DOCUMENTS[0], DOCUMENTS[5]), PairDocument(DOCUMENTS[3], document([5, 8, 2], [1, 13, 40, 2]))]


def compiled_mask(shape, rate, seed, device):
    """What the compiled ops draw in place of `low_rank.dropout_keep`."""
    up = compiled_low_rank.IN_CPP.up
    return up(torch.ones(shape[0], 1, 1), [torch.ones(1, shape[1])], [(rate, seed)]).bool()


def same_masks(monkeypatch):
    """Have the plain path draw the masks of the fused one."""
    if compiled_low_rank.reason_not() is None:
        monkeypatch.setattr(low_rank, "dropout_keep", compiled_mask)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """What is done a piece at a time takes two pieces and more of these batches."""
    monkeypatch.setattr(decoder, "TILE_TOKENS", 60)
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "COMPILED_ROWS", 16)


def adapted(folder, provider, storage="dense", dropout=0.0):
    """The checkpoint as a run trains it: all linear layers and all experts adapted, B not zero. All these checkpoints
    are stored in bfloat16."""
    provider = PROVIDERS[provider]("cpu")
    ops = replace(provider.ops, stored_products=None) if storage == "dense" else provider.ops
    model = load_base(folder, ops=ops, **STORAGES[storage])
    targets = ("all-linear", *(EXPERTS if model.spec.experts else ()))
    inject(model, LoraSpec(2, 4, dropout, targets), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model.train()


class LinearByAutograd(nn.Module):
    """x Wᵀ + b + s·(x Aᵀ) Bᵀ over a dense W."""

    def __init__(self, layer: LoRALinear):
        super().__init__()
        weight = dequantized_weight(layer.base, torch.float32).clone()
        self.weight, self.bias, self.scaling = weight.requires_grad_(False), layer.base.bias, layer.scaling
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scaling * (x @ self.lora_A.t()) @ self.lora_B.t()


class StackByAutograd(LoRAStack):
    """That for the rows of each expert."""

    def __init__(self, layer: LoRAStack):
        nn.Module.__init__(self)
        weights = [expert_weight(layer.base, e, torch.float32).detach().clone() for e in range(layer.shape[0])]
        self.weights, self.scaling, self.lora_A, self.lora_B = weights, layer.scaling, layer.lora_A, layer.lora_B

    def forward(self, x, bias, counts):
        outs = []
        for e, rows in enumerate(x.split(counts)):
            low = rows @ self.lora_A[e].t()
            out = F.linear(rows, self.weights[e], None if bias is None else bias[e])
            outs.append(out + self.scaling * low @ self.lora_B[e].t())
        return torch.cat(outs)


def by_autograd(model):
    """A copy of a plain model without a gradient that is written by hand, in its layers or its head."""
    model = deepcopy(model)
    for name, layer in list(lora_layers(model)):
        made = StackByAutograd(layer) if isinstance(layer, LoRAStack) else LinearByAutograd(layer)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made)
    model.ops = replace(PLAIN, token_nll=lambda h, w, targets: F.cross_entropy(h @ w.t(), targets, reduction="none"))
    return model


def outcome(model, batch, loss=sft_loss, recompute=None) -> dict[str, torch.Tensor]:
    """The loss, and by its name the gradient of every trained tensor. Dropout is drawn from the same seed each time."""
    model.recompute = recompute
    model.zero_grad()
    torch.manual_seed(7)
    result = loss(model, batch)
    (result.total / result.count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": result.total.detach() / result.count, **gradients}


def assert_same(found, expected):
    """Each as a share of its own size. Float32 alone takes these models' gradients up to 1e-5 from those in float64, on
    the plain path as on the fused; between the two 6e-6 was measured, and of the losses 3e-7 (SFT) and 1e-6 (DPO)."""
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in expected.items():
        difference = float((found[name] - value).norm() / value.norm())
        assert difference <= (5e-6 if name == "loss" else 2e-5), (name, difference)


@pytest.mark.parametrize("name, storage", CASES, ids=map("-".join, CASES))
def test_losses_and_gradients_are_those_of_autograd(name, storage):
    folder = golden.family(name)[0]
    plain, fused = (adapted(folder, provider, storage) for provider in ("huggingface", "unsloth"))
    assert (plain.ops.name, fused.ops.name) == ("plain", "fused")
    for _, layer in lora_layers(fused):
        stack = StackMxfp4 if name == MXFP4 else STACKED_IN[storage]
        assert isinstance(layer.base, stack if isinstance(layer, LoRAStack) else STORED_IN[storage])
    alone, shared = (collate(DOCUMENTS, share_prefixes=share) for share in (False, True))
    assert alone.parents is None and shared.parents is not None
    expected = outcome(by_autograd(plain), alone)
    assert_same(outcome(plain, shared), expected)
    for batch, settings in ((alone, RECOMPUTE if storage == "dense" else RECOMPUTE[:1]), (shared, RECOMPUTE)):
        for recompute in settings:
            assert_same(outcome(fused, batch, recompute=recompute), expected)


@pytest.mark.parametrize("name", ["mistral_sliding", "mixtral_sliding", "gemma3_text_hub"])
def test_documents_within_the_window_are_fused_in_layers_that_slide(name):
    batch = collate([document([5], [40]), document([9], [7, 8, 2]), document([3, 1], [4, 17, 6])])
    plain, fused = (adapted(golden.family(name)[0], provider) for provider in ("huggingface", "unsloth"))
    assert max(batch.document.unique_consecutive(return_counts=True)[1]) < plain.spec.layers[0].window
    assert_same(outcome(fused, batch), outcome(by_autograd(plain), batch))


def balanced_by_the_book(model, batch):
    """The loss without balance, and coefficient · E · Σ_e f_e P_e of all layers. Switch (2101.03961) Eq. 4-6."""
    experts, logits = model.spec.experts, []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, out: logits.append(out))
    model.spec = replace(model.spec, experts=replace(experts, balance_coef=0.0))
    plain, logits = sft_loss(model, batch), torch.cat(logits)
    chosen = F.one_hot(logits.topk(experts.top_k).indices, experts.count).sum(1).float()
    balance = experts.count * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    return LossSum(plain.total + experts.balance_coef * balance * plain.count, plain.count)


@pytest.mark.parametrize("name", ["qwen3_moe_hub", MXFP4])
def test_the_balance_loss_reaches_the_adapters_on_both_paths(name, tmp_path):
    folder = shutil.copytree(golden.family(name)[0], tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    plain, fused = (adapted(folder, provider) for provider in ("huggingface", "unsloth"))
    batch = collate(DOCUMENTS)
    expected = outcome(by_autograd(plain), batch, balanced_by_the_book)
    assert_same(outcome(plain, batch), expected)
    for recompute in RECOMPUTE:
        assert_same(outcome(fused, batch, recompute=recompute), expected)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dropout_is_the_same_on_both_paths_and_when_it_is_made_again(name, monkeypatch):
    """Masks come from the seed alone, not from how often the backward makes them; the plain path, given the masks that
    the compiled ops draw, has their results. One tile, because each draws its own."""
    monkeypatch.setattr(decoder, "TILE_TOKENS", 1024)
    same_masks(monkeypatch)
    plain, fused = (adapted(golden.family(name)[0], provider, dropout=0.3) for provider in ("huggingface", "unsloth"))
    batch = collate(DOCUMENTS)
    expected = outcome(plain, batch)
    without = outcome(plain.eval(), batch)
    assert not torch.allclose(expected["loss"], without["loss"], rtol=1e-4)
    for recompute in RECOMPUTE:
        assert_same(outcome(fused, batch, recompute=recompute), expected)


@pytest.mark.parametrize("name", ["llama_tied_bias", "phi3_sliding"])
def test_each_tile_has_its_own_masks_in_the_backward_too(name):
    """Along a random direction the gradients are the loss's finite difference, drawn from the same seed."""
    model, batch = adapted(golden.family(name)[0], "unsloth", dropout=0.3), collate(DOCUMENTS)
    gradients = {n: g.clone() for n, g in outcome(model, batch, recompute="selective").items() if n != "loss"}
    generator, step, losses = torch.Generator().manual_seed(3), 1e-3, []
    direction = {n: torch.randn(g.shape, generator=generator) for n, g in gradients.items() if ".mlp." in n}
    assert direction.keys() < gradients.keys()
    for move in (step, -2 * step):
        for n, d in direction.items():
            model.get_parameter(n).data += move * d
        losses.append(float(outcome(model, batch, recompute="selective")["loss"]))
    expected = (losses[0] - losses[1]) / (2 * step)
    assert sum(float((gradients[n] * d).sum()) for n, d in direction.items()) == pytest.approx(expected, rel=1e-2)


# --- DPO


def dpo_by_the_book(policy, base):
    """The loss of PAIRS and its gradients, each response by itself from its whole logits. DPO (2305.18290) Eq. 7."""

    def logp(model, document):
        ids = torch.from_numpy(document.ids.astype(np.int64))
        logps = model.logits(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])
        return logps[torch.from_numpy(document.is_trained[1:])].sum()

    policy.zero_grad()
    terms = []
    for pair in PAIRS:
        won, lost = (logp(policy, side) - logp(base, side).detach() for side in (pair.chosen, pair.rejected))
        terms.append(-F.logsigmoid(0.1 * (won - lost)))
    loss = sum(terms) / len(terms)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in policy.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize(
    "name, storage", [("llama_tied_bias", "nf4"), (MXFP4, "int8"), ("llama_tied_bias", "bfloat16")]
)
def test_dpo_has_the_loss_and_gradients_of_its_equation(name, storage):
    folder = golden.family(name)[0]
    plain, fused = (adapted(folder, provider, storage) for provider in ("huggingface", "unsloth"))
    policy, base = by_autograd(plain), by_autograd(plain)
    for module in base.modules():
        if isinstance(module, LinearByAutograd | StackByAutograd):
            module.scaling = 0.0
    expected = dpo_by_the_book(policy, base)
    assert abs(float(expected["loss"]) - math.log(2)) > 1e-3
    loss = preference_objective("sigmoid", LossOptions(beta=0.1)).loss
    for batch in (collate_pairs(PAIRS, share_prefixes=share) for share in (False, True)):
        assert_same(outcome(plain, batch, loss), expected)
        for recompute in RECOMPUTE:
            assert_same(outcome(fused, batch, loss, recompute), expected)


# --- runs


class Killed(BaseException):
    """Stands for a kill -9: nothing in the program may catch it."""


RUNS = {
    "llama nf4 selective": {"use_4bit": True, "use_nested_quant": True, "recompute": "selective"},
    "gpt_oss mxfp4 full": {"use_4bit": True, "recompute": "full", "target_modules": ["q_proj", "v_proj", *EXPERTS]},
    "llama int8": {"use_8bit": True, "use_4bit": False, "gradient_checkpointing": False},
}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """run(case, provider, folder, **others) -> RunResult of six steps with dropout, on one dataset."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 12)
    bases = {"llama": tiny, "gpt_oss": write_checkpoint(root / "gpt_oss", "gpt_oss", mxfp4=True)}

    def train(case, provider, folder, resume=False, on_metrics=None):
        settings = {
            "task": "text-generation", "model_name": str(bases[case.split()[0]]), "dataset": str(rows),
            "compute_specs": "high_end", "device": "cpu", "dtype": "float32", "bnb_4bit_compute_dtype": "float32",
            "provider": provider, "output_dir": str(root / case / folder), "max_steps": 6, "logging_steps": 1,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "lora_r": 4,
            "lora_dropout": 0.2, "optim": "adamw_torch", "eval_split": 0, "save_strategy": "steps", "save_steps": 3,
            **RUNS[case],
        }  # fmt: skip
        config = mini_forge.TrainingConfig.from_dict(settings)
        return mini_forge.train(config, resume=resume, report=str, on_metrics=on_metrics)

    return train


def numbers(result):
    return [[m[key] for m in result.metrics] for key in ("step", "tokens", "loss", "grad_norm")]


@pytest.mark.parametrize("case", RUNS)
def test_a_fused_run_is_the_plain_one_and_resumes_bit_for_bit(case, run, monkeypatch):
    same_masks(monkeypatch)

    def die(record):
        if record["step"] == 5:
            raise Killed

    plain, fused = run(case, "huggingface", "plain"), run(case, "unsloth", "fused")
    with pytest.raises(Killed):
        run(case, "unsloth", "killed", on_metrics=die)
    resumed = run(case, "unsloth", "killed", resume=True)
    assert numbers(resumed) == numbers(fused)
    whole, halves = (load_file(r.output_dir / "adapter_model.safetensors") for r in (fused, resumed))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)
    (steps, tokens, *found), (*same, losses, norms) = numbers(fused), numbers(plain)
    assert [steps, tokens] == same and steps == [1, 2, 3, 4, 5, 6]
    assert found[0] == pytest.approx(losses, rel=1e-5)
    assert found[1] == pytest.approx(norms, rel=1e-4)


# --- dropout


SIZE = 512


@pytest.fixture(params=["torch", "c++"])
def products(request):
    """What makes LoRA's own products, and draws the masks between x and them."""
    if request.param == "c++" and (reason := compiled_low_rank.reason_not()):
        pytest.skip(reason)
    return low_rank.IN_TORCH if request.param == "torch" else compiled_low_rank.IN_CPP


def projections(rate, products):
    """Three layers of one input that put out what dropout leaves of it: W = 0, A = B = I, s = 1."""
    made = []
    for _ in range(3):
        layer = LoRALinear(nn.Linear(SIZE, SIZE, bias=False), LoraSpec(SIZE, SIZE, rate))
        layer.low_rank = products
        layer.base.weight.data.zero_()
        layer.lora_A.data, layer.lora_B.data = torch.eye(SIZE), torch.eye(SIZE)
        made.append(layer.train())
    return made


def largest_correlation(a, b):
    """Of two series of M numbers, at every distance between them, in deviations of what chance gives: 1/√M."""
    spectra = [torch.fft.rfft((x - x.mean()).flatten().double() / x.std()) for x in (a, b)]
    correlations = torch.fft.irfft(spectra[0] * spectra[1].conj(), a.numel()) / math.sqrt(a.numel())
    if a is b:
        correlations[0] = 0
    return float(correlations.abs().max())


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_masks_have_the_rate_and_know_nothing_of_each_other(rate, products):
    """Counts of a row's and of a column's kept numbers vary as sums of independent draws do. Of the 2,600,000
    correlations (ten pairs at all distances) the largest is 4.3 to 5.6 deviations, by chance."""
    torch.manual_seed(0)
    x = torch.ones(SIZE, SIZE)
    kept = [out.detach() for _ in range(2) for out in project(x, *projections(rate, products))]
    for values in kept:
        assert set(values.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - rate)))}
        mask = (values > 0).double()
        assert abs(float(mask.mean()) - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate)) / SIZE
        for dim in (0, 1):
            variance = float(mask.sum(dim).var()) / (SIZE * rate * (1 - rate))
            assert abs(variance - 1) < 5 * math.sqrt(2 / SIZE)
    pairs = [(a, b) for i, a in enumerate(kept[:4]) for b in kept[i:4]]  # the fourth: the first layer's next pass
    assert max(largest_correlation(a, b) for a, b in pairs) < 6.5


def test_the_backward_has_each_projections_own_mask(products):
    """Of an input of ones the output is the mask, over 1 - rate; each gradient is then the formula's with that mask."""
    layers = projections(0.3, products)
    x = torch.ones(SIZE, SIZE, requires_grad=True)
    outs = project(x, *layers)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(SIZE, SIZE, generator=generator) for _ in layers]
    torch.autograd.backward(outs, upstream)
    masks = [out.detach() for out in outs]
    torch.testing.assert_close(x.grad, sum(g * mask for g, mask in zip(upstream, masks, strict=True)))
    for layer, g, mask in zip(layers, upstream, masks, strict=True):
        torch.testing.assert_close(layer.lora_A.grad, g.t() @ mask, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.lora_B.grad, g.t() @ mask, rtol=1e-4, atol=1e-3)
