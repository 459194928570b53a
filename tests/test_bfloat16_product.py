"""Products of float32 activations with bfloat16 weights, and the layers, heads and files that use them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mini_forge
import mini_forge_kernels
from mini_forge.bench.shapes import random_base
from mini_forge.config_plan import Plan
from mini_forge.io.weights import bfloat16_matrices, load_base
from mini_forge.memory_items import Job, sizes_of, stored_bytes
from mini_forge.model.cache import KVCache, read_prompts
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec
from mini_forge.model.functional import LeftSide
from mini_forge.model.lora import LoRALinear, LoraSpec, inject, lora_layers, merge, project
from mini_forge.model.quant import (
    Linear4bit,
    Linear8bit,
    Linear16bit,
    add_products_16bit,
    dequantized_weight,
    frozen_gradient,
    frozen_products,
)
from mini_forge.providers import PROVIDERS
from mini_forge.training import losses
from mini_forge_kernels import bfloat16_product
from mini_forge_kernels.bfloat16_product import Compiled, Mkl, Split, backend, reason_not
from mini_forge_kernels.compiled import CannotCompile
from tests.tiny import write_checkpoint, write_rows

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (1, 64, 7), (3, 5, 2), (Mkl.FEW_ROWS, 33, 130), (Mkl.FEW_ROWS + 1, 33, 130), (16, 32, 32),
          (131, 576, 96), (45, 800, 260), (300, 1600, 33), (0, 8, 4), (40, 0, 3), (40, 3, 0)]  # fmt: skip


def in_torch(a, b, transposed, out, adds):
    """What MKL's function computes, of the same arguments."""
    product = a.float() @ (b.t() if transposed else b).float()
    out.add_(product) if adds else out.copy_(product)


def emulate(monkeypatch):
    monkeypatch.setattr(Mkl, "multiply_one", in_torch)
    use(monkeypatch, Mkl)


def use(monkeypatch, unit):
    monkeypatch.setattr(bfloat16_product, "backend", lambda: (unit, None))
    monkeypatch.setattr(bfloat16_product, "reason_not", lambda device: None)


def why_not(unit):
    """Why one of the two ways cannot be tested here."""
    if reason := reason_not(CPU):
        return reason
    if unit is Compiled:
        return backend()[1]
    return None if Mkl.gemm() else "this torch has no MKL"


@pytest.fixture(params=["c++", "mkl", "emulated"])
def products(request, monkeypatch):
    """The products as they are made and, so that all around them is tested on every machine, in torch."""
    if request.param == "emulated":
        return emulate(monkeypatch)
    unit = {"c++": Compiled, "mkl": Mkl}[request.param]
    if reason := why_not(unit):
        pytest.skip(reason)
    use(monkeypatch, unit)


def parts_of(unit, x):
    """(3, N, K): as `unit` splits x, in MKL's layout."""
    parts, (N, K) = unit.split(x), x.shape
    if unit is Mkl:
        return parts
    across = parts.permute(2, 0, 3, 1, 4).reshape(3, parts.shape[0] * 16, parts.shape[1] * 32)
    assert not across[:, N:].any() and not across[:, :, K:].any()  # what lies beyond x
    return across[:, :N, :K]


@pytest.fixture(params=[Compiled, Mkl], ids=lambda unit: unit.name)
def unit(request, monkeypatch):
    """What multiplies, by itself."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    use(monkeypatch, request.param)
    return request.param


@pytest.fixture
def compiled(monkeypatch):
    if reason := why_not(Compiled):
        pytest.skip(reason)
    use(monkeypatch, Compiled)


def drawn(*shape, seed=0, spread=0.0):
    """Normal numbers, times e to the power of others of deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


def rms(x):
    return float(x.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (16, 32), (300, 1000), (0, 3), (5, 0)])
def test_three_parts_are_all_of_a_number(shape, unit, monkeypatch):
    monkeypatch.setattr(Mkl, "CHUNK", 4096)
    x = drawn(*shape, spread=8.0)
    parts = parts_of(unit, x)
    assert parts.dtype == torch.bfloat16 and parts.shape == (3, *shape)
    assert torch.equal(parts.double().sum(0), x.double())


def test_numbers_at_the_edges_of_rounding_are_split_exactly(unit):
    mantissas = torch.tensor(
        [0, 1, 2**7, 2**15, 2**15 - 1, 2**15 + 1, 2**16 - 1, 2**23 - 1, 2**22 + 2**14], dtype=torch.int32
    )
    exponents = torch.tensor([127, 1 + 24, 253, 100], dtype=torch.int32)
    x = (mantissas[:, None] + (exponents << 23)[None]).view(torch.float32)
    x = torch.cat((x, -x))
    assert torch.equal(parts_of(unit, x).double().sum(0), x.double())
    assert torch.equal(parts_of(unit, x).double(), parts_of(Mkl, x).double())
    wide = drawn(10, 80)[:, 3:40]
    assert torch.equal(parts_of(unit, wide).double().sum(0), wide.double())


@pytest.mark.parametrize("N, K, out", SHAPES)
def test_products_are_those_of_float64(products, N, K, out):
    x, grad, weight = drawn(N, K), drawn(N, out, seed=1), drawn(out, K, seed=2).bfloat16()
    exact, back = x.double() @ weight.double().t(), grad.double() @ weight.double()
    made, made_back = Split(x).product_t(weight), Split(grad).product(weight)
    if N and K and out:
        strided = drawn(K, N).t()
        torch.testing.assert_close(Split(strided).product_t(weight), Split(strided.contiguous()).product_t(weight))
    assert made.shape == (N, out) and made_back.shape == (N, K) and made.dtype == made_back.dtype == torch.float32
    torch.testing.assert_close(made.double(), exact, rtol=1e-6, atol=1e-6 * K**0.5)
    torch.testing.assert_close(made_back.double(), back, rtol=1e-6, atol=1e-6 * out**0.5)
    sum_, onto = made_back.double() + 1, torch.ones(N, 2 * K)[:, :K]
    assert Split(grad).product(weight, onto) is onto
    torch.testing.assert_close(onto.double(), sum_, rtol=1e-6, atol=1e-6 * out**0.5)
    onto = torch.ones(N, out)
    assert Split(x).product_t(weight, onto) is onto
    torch.testing.assert_close(onto.double(), exact + 1, rtol=1e-6, atol=1e-6 * K**0.5)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_they_are_closer_to_float64_than_those_of_float32(unit, spread):
    x, weight = drawn(200, 1536, spread=spread), drawn(300, 1536, seed=2).bfloat16()
    exact = x.double() @ weight.double().t()
    error = rms(Split(x).product_t(weight) - exact)
    assert error < rms(LeftSide(x).product_t(weight.float()) - exact) and error < 4e-7 * rms(exact)


def test_the_same_bits_wherever_a_tensor_lies(unit):
    """A resumed run finds its tensors at other addresses."""
    x, weight = drawn(100, 96), drawn(200, 96, seed=1).bfloat16()
    expected = Split(x).product_t(weight)
    for offset in (1, 2, 3, 5, 8):
        room = torch.empty(weight.numel() + offset, dtype=torch.bfloat16)
        moved = room[offset:].view(weight.shape).copy_(weight)
        assert torch.equal(Split(x).product_t(moved), expected)
        room = torch.empty(x.numel() + offset)
        assert torch.equal(Split(room[offset:].view(x.shape).copy_(x)).product_t(weight), expected)


@pytest.mark.parametrize("N", [1, 40, 300])
def test_threads_share_the_work_and_change_no_bit(compiled, N, monkeypatch):
    x, weight = drawn(N, 100), drawn(333, 100, seed=1).bfloat16()
    expected = Split(x).product_t(weight)
    for threads in (1, 2, 3, 4, 6, 7, 16):  # more than there are cores, too
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(Split(x).product_t(weight), expected)


def test_nothing_beside_the_result_is_written(compiled):
    for N, columns in ((1, 1), (16, 16), (37, 50), (64, 33)):
        room = torch.full((N + 2, columns + 40), 7.0)
        Split(drawn(N, 20)).product_t(drawn(columns, 20, seed=1).bfloat16(), room[1 : N + 1, 3 : columns + 3])
        assert (room == 7).sum() == room.numel() - N * columns


def test_without_a_compiler_mkl_multiplies(monkeypatch):
    def refuses(*_):
        raise CannotCompile("no g++ here")

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(bfloat16_product, "library", refuses)
    monkeypatch.setattr(Compiled, "library", staticmethod(Compiled.library.__wrapped__))
    monkeypatch.setattr(bfloat16_product, "backend", backend.__wrapped__)
    monkeypatch.setattr(Mkl, "gemm", lambda: "a function")
    assert PROVIDERS["unsloth"]("cpu").backends["bfloat16_product"] == "mkl"
    assert "mkl: bfloat16_product (no g++ here)" in PROVIDERS["unsloth"]("cpu").describe()
    monkeypatch.setattr(Mkl, "gemm", lambda: None)
    assert reason_not(CPU) == "no g++ here, and this torch has no MKL"
    assert PROVIDERS["unsloth"]("cpu").ops.left_side is None


def test_what_does_not_fit_is_refused(products):
    left = Split(drawn(40, 6))
    for weight in (drawn(5, 6), drawn(5, 7).bfloat16(), drawn(6, 5).bfloat16().t()):
        with pytest.raises(ValueError, match="weight"):
            left.product_t(weight)
    with pytest.raises(ValueError, match="weight"):
        left.product(drawn(5, 6).bfloat16())
    with pytest.raises(ValueError, match="weight"):
        left.product_t(drawn(1, 6).bfloat16().expand(5, 6))
    with pytest.raises(ValueError, match="x: torch.float64"):
        Split(drawn(40, 6).double())


@pytest.mark.parametrize("shape, turned", [((39, 5), False), ((40, 6), False), ((200,), False), ((5, 40), True)])
def test_what_cannot_be_added_to_is_refused(shape, turned):
    onto = torch.zeros(shape).t() if turned else torch.zeros(shape)
    with pytest.raises(ValueError, match="onto"):
        Split(drawn(40, 6)).product(drawn(6, 5).bfloat16(), onto)


def test_a_reason_is_named_where_they_cannot_run(monkeypatch):
    assert reason_not(torch.device("cuda")) == "for CPUs, this is cuda"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert reason_not(CPU) == "this CPU has no AMX" and PROVIDERS["unsloth"]("cpu").ops.left_side is None
    monkeypatch.setattr(mini_forge_kernels, "reason_not", lambda device: None)  # of a GPU that is not here
    assert PROVIDERS["huggingface"]("cpu").ops.left_side is PROVIDERS["unsloth"]("cuda").ops.left_side is None


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (2, 3, 24), (1, 24), (24,), (0, 24)])
def test_a_layer_is_the_linear_one(products, shape, has_bias):
    weight, x = drawn(10, 24).bfloat16(), drawn(*shape, seed=1)
    bias = nn.Parameter(drawn(10, seed=2)) if has_bias else None
    layer, dense = Linear16bit(weight, bias, Split), nn.Linear(24, 10, bias=has_bias).double()
    dense.weight.data.copy_(weight)
    if has_bias:
        dense.bias.data.copy_(bias)
        layer.bias.requires_grad_()
    results = []
    for module, leaf in ((layer, x.clone().requires_grad_()), (dense, x.double().requires_grad_())):
        out = module(leaf)
        (out * out).sum().backward()
        results.append([out, leaf.grad, *([module.bias.grad] if has_bias else [])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantized(), weight.float()) and torch.equal(layer.dense().weight, weight.float())
    assert layer.half().weight.dtype == torch.bfloat16  # as other frozen forms, it keeps its own


def test_layers_that_share_their_input_split_it_once(products):
    made = []

    class Counted(Split):
        def __init__(self, x):
            made.append(x)
            super().__init__(x)

    x, layers = drawn(50, 8), [Linear16bit(drawn(n, 8).bfloat16(), None, Counted) for n in (4, 6)]
    outs = [torch.ones(50, layer.out_features) for layer in layers]
    add_products_16bit(x, layers, outs)
    assert len(made) == 1
    torch.testing.assert_close(outs[1], 1 + x @ layers[1].dequantized().t())
    grad = drawn(50, 6)
    torch.testing.assert_close(frozen_gradient(grad, layers[1]), grad @ layers[1].dequantized())


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_loss_head(products, tokens):
    hidden, weight = drawn(tokens, 24), drawn(1000, 24, seed=1).bfloat16()
    targets = torch.arange(tokens) * 7
    results = []
    for nll, h, w in ((PROVIDERS["unsloth"]("cpu").ops.token_nll, hidden, weight),
                      (losses.token_nll, hidden.double(), weight.double())):  # fmt: skip
        h = h.clone().requires_grad_()
        found = nll(h, w, targets)
        found.sum().backward()
        results.append((found, h.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def stored(tmp_path):
    """A checkpoint of which all but the norms and one projection is stored in bfloat16."""
    folder = write_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    kept = "model.layers.1.self_attn.o_proj.weight"
    tensors = {n: t if t.dim() == 1 or n == kept else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, {n for n, t in tensors.items() if t.dtype == torch.bfloat16}


def test_a_checkpoint_keeps_its_matrices_as_they_are_stored(products, stored):
    folder, names = stored
    plain, fused = (load_base(folder, ops=PROVIDERS[name]("cpu").ops) for name in ("huggingface", "unsloth"))
    tensors = {**dict(fused.named_parameters()), **dict(fused.named_buffers())}
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16} == names
    assert {tensor.dtype for tensor in plain.parameters()} == {torch.float32} and not list(plain.buffers())
    assert bfloat16_matrices(folder, plain) == names
    plan = Plan("cpu", "float32", None, False, "float32", False, [])
    job = Job(plan, 10, 10, 8, "sgd", None, True, in_bfloat16=frozenset(names))
    sizes = sizes_of(plain, None)
    assert sum(stored_bytes(sizes, n, job) for n in sizes.shapes) == sum(tensor.nbytes for tensor in tensors.values())
    ids = torch.arange(1, 50)[None]
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.logits(ids), plain.logits(ids), rtol=2e-5, atol=2e-5)
    for options in ({"dtype": torch.bfloat16}, {"dtype": None}):  # nothing is float32 here
        model = load_base(folder, ops=PROVIDERS["unsloth"]("cpu").ops, **options)
        assert not any(isinstance(module, Linear16bit) for module in model.modules())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_layers_stay_quantized_beside_the_head(products, stored, quantization):
    folder, _ = stored
    plain, fused = (
        load_base(folder, quantization=quantization, ops=PROVIDERS[name]("cpu").ops)
        for name in ("huggingface", "unsloth")
    )
    assert [name for name, module in fused.named_modules() if isinstance(module, Linear16bit)] == ["lm_head"]
    assert fused.head_weight.dtype == torch.bfloat16
    ids = torch.arange(1, 50)[None]
    torch.testing.assert_close(fused.logits(ids), plain.logits(ids), rtol=2e-5, atol=2e-5)


def test_random_weights_are_held_like_a_checkpoints(products, stored):
    folder, _ = stored
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for said in (None, "bfloat16", "float32"):
        (folder / "config.json").write_text(json.dumps({**config, **({"dtype": said} if said else {})}))
        model = random_base(folder, torch.float32, ops=PROVIDERS["unsloth"]("cpu").ops)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        matrices = {name for name, tensor in tensors.items() if tensor.dim() == 2}
        kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
        assert kept == (set() if said == "float32" else matrices)
        with torch.device("meta"):
            assert bfloat16_matrices(folder, Decoder(decoder_spec(config))) == kept


def test_merging_gives_a_float32_layer(products, stored):
    model = load_base(stored[0], ops=PROVIDERS["unsloth"]("cpu").ops)
    inject(model, LoraSpec(2, 4), torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(1, 50)[None]
    before = model.logits(ids)
    merged = merge(model)
    assert not any(isinstance(m, Linear16bit) for n, m in merged.named_modules() if n != "lm_head")
    torch.testing.assert_close(merged.logits(ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["sft", "dpo"])
def test_a_run_is_the_plain_run(products, stored, tmp_path, strategy):
    if strategy == "dpo":
        rows = tmp_path / "pairs.jsonl"
        pairs = [{"prompt": f"{i}", "chosen": f"= {i * i}", "rejected": "no idea"} for i in range(8)]
        rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    else:
        rows = write_rows(tmp_path / "rows.jsonl")
    logged, said = {}, {}
    for provider in ("huggingface", "unsloth"):
        config = mini_forge.TrainingConfig.from_dict({
            "task": "text-generation", "strategy": strategy, "model_name": str(stored[0]), "dataset": str(rows),
            "output_dir": str(tmp_path / provider), "compute_specs": "high_end", "device": "cpu", "dtype": "float32",
            "provider": provider, "lora_dropout": 0.0, "optim": "adamw_torch", "max_steps": 4, "logging_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_split": 0, "save_strategy": "no",
        })  # fmt: skip
        reports = []
        mini_forge.train(config, report=reports.append)
        said[provider] = "\n".join(reports)
        lines = (tmp_path / provider / "metrics.jsonl").read_text().splitlines()
        logged[provider] = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert "(bfloat16 and float32, training in float32)" in said["unsloth"]
    assert "(float32, training in float32)" in said["huggingface"]
    assert len(logged["unsloth"]) == 4
    assert logged["unsloth"] == pytest.approx(logged["huggingface"], rel=1e-5)


def linear(kind, weight, bias):
    """A frozen layer of (out, in) bfloat16 numbers."""
    if kind == "bfloat16":
        return Linear16bit(weight.bfloat16(), bias, Split)
    if kind == "dense":
        layer = nn.Linear(*weight.shape[::-1], bias=bias is not None)
        layer.weight, layer.bias = nn.Parameter(weight), bias
        return layer
    if kind == "int8":
        return Linear8bit.from_weight(weight, bias)
    layer = Linear4bit.from_weight(weight, bias, compute_dtype=torch.bfloat16 if "16" in kind else None)
    if "multiplied" in kind:  # as Triton's kernel
        layer.matmul = lambda x, q, bias: nn.functional.linear(x, dequantized_weight_of(q, x.dtype), bias)
    return layer


def dequantized_weight_of(quantized, dtype):
    return dequantized_weight(Linear4bit(quantized), dtype).clone()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bfloat16", "dense", "int8", "nf4", "nf4 in 16 bits", "nf4 multiplied"])
def test_an_adapter_of_zeros_changes_no_bit(products, kind, dtype, rows, has_bias):
    """DPO's first rewards are 0 because policy and reference compute the same."""
    weight, x = drawn(130, 600).bfloat16().float(), drawn(rows, 600, seed=1).to(dtype)
    layer = linear(kind, weight, nn.Parameter(drawn(130, seed=2)) if has_bias else None)
    layer = layer.to(dtype) if kind == "dense" else layer
    adapted = LoRALinear(layer, LoraSpec(4, 6))
    expected = frozen_products(x, [layer])[0]
    assert expected.dtype == dtype and torch.equal(adapted(x), expected)
    adapted.enabled = False
    with torch.no_grad():
        assert torch.equal(project(x, adapted)[0], expected)


def test_text_is_generated_as_by_the_plain_model(products, stored):
    """Through the cache, whose keys and values are of the activations' dtype."""
    plain, fused = (load_base(stored[0], ops=PROVIDERS[name]("cpu").ops) for name in ("huggingface", "unsloth"))
    found = []
    for model in (plain, fused):
        cache = KVCache(model, 2, 12)
        with torch.no_grad():
            lengths = torch.tensor([5, 3])
            hidden = read_prompts(model, [[1, 2, 3, 4, 5], [6, 7, 8]], lengths, cache)
            token = torch.tensor([[9], [10]])
            found.append((model.head(hidden), model.head(model(token, position=lengths[:, None], cache=cache))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_a_model_can_be_moved_and_copied(products, stored):
    model = load_base(stored[0], ops=PROVIDERS["unsloth"]("cpu").ops)
    ids = torch.arange(1, 50)[None]
    expected = model.logits(ids)
    assert torch.equal(copy.deepcopy(model).logits(ids), expected)
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj).to("meta")  # stands for any device but the CPU
    assert layer(torch.empty(3, layer.in_features, device="meta")).shape == (3, layer.out_features)
    assert copy.deepcopy(model).half().logits(ids).dtype == torch.float32
