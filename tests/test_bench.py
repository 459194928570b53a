"""bench: sizes and operations against numbers worked out by hand, the table's groups, and the command as a whole."""

import ast
import json
import subprocess
import sys
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mini_forge.bench import measure, op_table, shapes
from mini_forge.bench.flops import matrix_weights, met_weights, parameter_count, step_flops, visible_pairs
from mini_forge.bench.op_table import OPS, StepProfile, label, labelled
from mini_forge.bench.shapes import SHAPES, prepare_shape, random_base
from mini_forge.cli import main
from mini_forge.config import TrainingConfig
from mini_forge.data.batches import Document, collate
from mini_forge.data.pairs import PairDocument, collate_pairs
from mini_forge.io.weights import load_base
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec
from mini_forge.model.lora import LoraSpec, inject
from mini_forge.model.ops import Ops
from mini_forge.providers import PROVIDERS
from mini_forge.training.loop import Interrupted
from mini_forge_kernels import rowwise
from tests.tiny import CONFIG, write_rows

ROOT = Path(__file__).parent.parent
FAMILIES = Path(__file__).parent / "golden" / "families"
PUBLISHED = {  # parameters, as the models' hub pages count them
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
KEYS = {
    "model", "has_random_weights", "parameters", "stored_bytes", "device", "device_name", "dtype", "quantization",
    "stored_in", "ops", "notes", "matmul_peak", "load_seconds", "first_step_seconds", "first_step_since", "steps",
    "step_seconds", "tokens", "trained_tokens", "tokens_per_second", "tokens_per_second_overall", "flops_per_token",
    "flops_per_token_by_part", "flops_per_second", "share_of_matmul_peak", "counted_as", "peak_memory_bytes",
    "predicted_memory_bytes", "profiled_step_seconds", "table",
}  # fmt: skip

GROUPS = {
    "matrix products", "LoRA products", "dequantizing", "attention", "norms", "rope", "gated unit", "loss head",
    "optimizer", "other operations", "between operations",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(measure, "PEAK_SECONDS", 0.005)
    monkeypatch.setattr(measure, "PEAK_SIZES_ELSEWHERE", (64, 128))


def config_of(**changes) -> TrainingConfig:
    base = {"task": "text-generation", "model_name": "m", "dataset": "d", "compute_specs": "low_end", "device": "cpu",
            "use_4bit": False, "gradient_checkpointing": False, "lora_r": 4, "gradient_accumulation_steps": 1,
            "optim": "adamw_torch"}  # fmt: skip
    return TrainingConfig.from_dict({**base, **changes})


@pytest.fixture
def config_file(tiny, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "task": "text-generation", "model_name": str(tiny), "dataset": str(write_rows(tmp_path / "rows.jsonl", 20)),
        "compute_specs": "low_end", "use_4bit": False, "output_dir": str(tmp_path / "run"), "lora_r": 4,
        "optim": "adamw_torch", "gradient_checkpointing": False,
    }))  # fmt: skip
    return path


def document(inputs: int, trained: int) -> Document:
    return Document(np.arange(inputs + 1, dtype=np.int32), np.arange(inputs + 1) > inputs - trained, 1)


# Sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_shape_has_its_model_s_parameters(name):
    assert set(SHAPES) == set(PUBLISHED)
    assert parameter_count(decoder_spec(SHAPES[name])) == PUBLISHED[name]


def test_a_token_meets_the_matrices_but_embedding_and_head():
    # a layer of Llama-3.1-8B: q and o 4096², k and v 4096·1024, gate, up and down 4096·14336
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert sum(matrix_weights(decoder_spec(SHAPES["llama-3.1-8b"])).values()) == 32 * layer == 6_979_321_856


def test_a_token_meets_the_chosen_experts_alone():
    # of Qwen3-30B-A3B: q and o 2048·4096, k and v 2048·512, the router of 128 experts, and 8 experts of width 768
    layer = 2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048 + 8 * 3 * 2048 * 768
    assert sum(matrix_weights(decoder_spec(SHAPES["qwen3-30b-a3b"])).values()) == 48 * layer == 2_730_491_904


# Operations. CONFIG: D 32, F 64, H 4, K 2, C 8, V 272, two layers of
# q and o 32·32, k and v 32·16, gate, up and down 32·64: N = 2 · 9,216 = 18,432, of which gate and up are M = 8,192.
# Only trained tokens meet the last layer's o, gate, up and down, 7,168, of which gate and up are 4,096.

TINY = decoder_spec(CONFIG)


def flops_of(batches, spec=TINY, **changes):
    config = config_of(**changes)
    return step_flops(config, spec, met_weights(config, spec), batches)


def test_flops_of_a_step_by_hand():
    # 3 and 5 tokens, of which 2 and 3 are trained on; 6 + 15 pairs in each of two layers
    batch = collate([document(3, 2), document(5, 3)])
    assert flops_of([batch]) == {
        "matrices": 4 * (18_432 * 8 - 7_168 * 3),
        "attention": 12 * 4 * 8 * (21 * 2),
        "head": 4 * 272 * 32 * 5,
    }
    assert flops_of([batch, batch])["head"] == 2 * 4 * 272 * 32 * 5


def test_recomputed_products_are_counted():
    batch = collate([document(3, 2), document(5, 3)])
    full = flops_of([batch], gradient_checkpointing=True, recompute="full")
    assert full == {"matrices": 6 * (18_432 * 8 - 7_168 * 3), "attention": 16 * 4 * 8 * 42, "head": 4 * 272 * 32 * 5}
    selective = flops_of([batch], gradient_checkpointing=True, recompute="selective")
    assert selective["matrices"] == (4 * 18_432 + 2 * 8_192) * 8 - (4 * 7_168 + 2 * 4_096) * 3
    assert selective["attention"] == 12 * 4 * 8 * 42


def test_the_reference_of_pairs_is_a_forward_pass():
    pair = PairDocument(document(3, 2), document(5, 3))
    dpo = {"strategy": "dpo"}
    once = flops_of([collate_pairs([pair])], **dpo)
    assert once == {"matrices": 6 * (18_432 * 8 - 7_168 * 3), "attention": 16 * 4 * 8 * 42, "head": 6 * 272 * 32 * 5}
    known = collate_pairs([replace(pair, reference=np.zeros(2, np.float32))])
    assert flops_of([known], **dpo)["matrices"] == 4 * (18_432 * 8 - 7_168 * 3)
    assert flops_of([collate_pairs([pair])], **dpo, loss_type="simpo")["matrices"] == 4 * (18_432 * 8 - 7_168 * 3)


def test_pairs_end_at_windows_and_chunks():
    row = collate([document(3, 2), document(5, 3)])
    layer = TINY.layers[0]
    windowed, chunked = replace(layer, window=2), replace(layer, chunk=2)
    assert visible_pairs(replace(TINY, layers=(windowed,)), row) == (1 + 2 + 2) + (1 + 2 + 2 + 2 + 2)
    assert visible_pairs(replace(TINY, layers=(chunked,)), row) == (1 + 2 + 1) + (1 + 2 + 1 + 2 + 1)
    assert visible_pairs(replace(TINY, layers=(layer, windowed)), row) == 21 + 14


# Random weights


@pytest.mark.parametrize("family", ["qwen3_moe_hub", "gpt_oss_mxfp4", "gemma3_text_hub", "phi3_partial_hub"])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_random_weights_lie_as_loaded_ones(family, quantization):
    options = {"quantization": quantization, "nested": quantization == "nf4"}
    loaded = load_base(FAMILIES / family, torch.bfloat16, **options)
    drawn = random_base(FAMILIES / family, torch.bfloat16, **options)
    facts = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (loaded, drawn)]
    assert facts[0] == facts[1]
    assert [type(m) for m in loaded.modules()] == [type(m) for m in drawn.modules()]
    assert not any(p.requires_grad for p in drawn.parameters())
    assert drawn.logits(torch.arange(8)[None]).isfinite().all()


def test_random_weights_have_their_deviation():
    torch.manual_seed(0)
    model = random_base(FAMILIES / "gpt_oss_mxfp4", torch.float32)
    assert model.model.norm.weight.eq(1).all()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    expert = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.expert(0)
    assert expert.std().item() == pytest.approx(0.02, rel=0.25)


def test_one_dense_matrix_at_a_time_is_drawn(monkeypatch):
    alive, most = weakref.WeakSet(), []
    draw = shapes._drawn

    def watched(shape, storage):
        tensor = draw(shape, storage)
        alive.add(tensor)
        most.append(sum(t.dim() == 2 for t in alive))
        return tensor

    monkeypatch.setattr(shapes, "_drawn", watched)
    model = random_base(FAMILIES / "qwen3_moe_hub", torch.float32, quantization="nf4")
    routers = sum(isinstance(m, nn.Module) and hasattr(m, "top_k") for m in model.modules())
    assert len(most) > 20
    assert max(most) <= 1 + 2 + routers  # embedding, head and routers stay dense


# The table


def test_every_op_has_a_group():
    own = {"stored_products", "low_rank", "four_bit", "mxfp4"}  # have ranges of their own
    assert set(OPS) == {f.name for f in fields(Ops)} - {"name"} - own
    assert set(OPS.values()) | set(op_table.OTHERS.values()) | set(op_table.COMPILED.values()) <= GROUPS


def test_operations_and_their_gradients_find_their_group():
    x = torch.randn(50, 60, requires_grad=True)
    weight, low, head = torch.randn(60, 60), torch.randn(60, 7), torch.randn(60, 99)
    profile = StepProfile("cpu")
    profile.start()
    y = labelled("norms", torch.sin)(x)  # whose gradient is a cosine
    y = (y @ weight).exp()
    loss = (y @ low).sum() + (y @ head).sum()
    loss.backward()
    profile.stop()
    found = {}
    for event, group in op_table._groups(profile.profile.events(), rank=7, vocab_size=99):
        found.setdefault(event.name, []).append(group)
    assert found["aten::sin"] == found["aten::cos"] == ["norms"]
    assert set(found["aten::exp"]) == {"other operations"}
    assert sorted(found["aten::mm"]) == [*["LoRA products"] * 2, *["loss head"] * 2, *["matrix products"] * 2]


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("provider", ["huggingface", "unsloth", "unsloth, in torch"])
def test_what_a_backward_makes_of_a_norm_or_a_unit_is_theirs(provider, recompute, monkeypatch):
    """Under adapted layers their gradients come from vjps, which no autograd node of theirs links to a forward. The
    backward alone is seen here, so nothing else could tell."""
    provider, _, in_torch = provider.partition(", ")
    if in_torch:
        monkeypatch.setattr(rowwise, "reason_not", lambda: "a test of torch's ops")
    model = Decoder(TINY, PROVIDERS[provider]("cpu").ops).train()
    inject(model, LoraSpec(4, 8))
    model.recompute = recompute
    label(model, torch.optim.SGD([torch.zeros(1)]))
    hidden = model(torch.arange(20)[None])
    profile = StepProfile("cpu")
    profile.start()
    hidden.sum().backward()
    profile.stop()
    found = {}
    for event, group in op_table._groups(profile.profile.events(), rank=4, vocab_size=272):
        found.setdefault(event.name, set()).add(group)
    assert not any("optimizer" in groups for groups in found.values())  # none has run
    if provider == "unsloth" and rowwise.reason_not() is None:
        # The last norm's gradient alone is an autograd node's; the first layer's input needs none, but is made again.
        expected = {"swiglu_gradient", "rms_norm_vjp", "rms_norm_gradient", "rms_norm", "rotate", "pull_back"}
        expected |= {"swiglu"} if recompute else set()
        compiled = {name: groups for name, groups in found.items() if name in op_table.COMPILED}
        assert compiled == {name: {op_table.COMPILED[name]} for name in expected}
        return
    assert found["aten::silu"] == found["aten::silu_backward"] == {"gated unit"}
    assert found["aten::rsqrt"] == {"norms"}
    assert found.get("aten::linalg_vector_norm", {"norms"}) == {"norms"}


def test_a_norm_s_length_is_the_norm_s_and_the_gradient_s_the_optimizer_s():
    x, profile = torch.randn(5, 6), StepProfile("cpu")
    profile.start()
    labelled("norms", torch.linalg.vector_norm)(x, dim=-1)
    torch.nn.utils.get_total_norm([x])
    profile.stop()
    groups = op_table._groups(profile.profile.events(), rank=4, vocab_size=99)
    assert {group for event, group in groups if event.name == "aten::linalg_vector_norm"} == {"norms", "optimizer"}
    assert {group for event, group in groups if event.name.startswith("aten::_foreach")} == {"optimizer"}


def test_shares_sum_to_one_and_python_is_told():
    profile = StepProfile("cpu")
    began = time.perf_counter()
    profile.start()
    torch.randn(300, 300) @ torch.randn(300, 300)
    time.sleep(0.05)
    wall = time.perf_counter() - began
    profile.stop()
    table = profile.table(wall, rank=4, vocab_size=99)
    assert sum(row["share"] for row in table) == pytest.approx(1)
    assert sum(row["seconds"] for row in table) == pytest.approx(wall)
    assert {row["group"]: row["seconds"] for row in table}["between operations"] >= 0.05


def test_labels_change_no_result(tiny):
    model = load_base(tiny, torch.float32, quantization="nf4")
    ids = torch.arange(12)[None]
    before = model.logits(ids)
    label(model, torch.optim.SGD([torch.zeros(1)]))
    assert torch.equal(model.logits(ids), before)


# Time


def test_the_matmul_peak_is_the_best_of_its_sizes(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks) * 0.001)
    peak = measure.matmul_peak(torch.device("cpu"), "float32", (96, 5000))
    assert peak == {"flops_per_second": pytest.approx(2 * 128**3 / 0.001), "size": 128, "dtype": "float32"}


def test_the_median_leaves_the_first_steps_out(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", CONFIG)
    prepared = prepare_shape(config_of(), "tiny", 6, 5, tmp_path)
    clock = [0.0, 10.0, 15.0, 16.0, 18.0, 21.0]  # steps of 10, 5, 1, 2 and 3 s, 6 tokens each
    batches = [[collate([each])] for each in prepared.train]
    results = measure._results(prepared, measure.Run(clock, batches, 5, 1.0, []), peak=1e6)
    assert results["tokens_per_second"] == pytest.approx(6 / 2)
    assert results["tokens_per_second_overall"] == pytest.approx(30 / 21)
    per_token = 4 * 18_432 + 12 * 4 * 8 * 2 * 21 / 6 + 4 * 272 * 32
    assert results["flops_per_token"] == pytest.approx(per_token)
    assert results["share_of_matmul_peak"] == pytest.approx(per_token * 3 / 1e6)


def test_the_last_steps_batches_are_profiled_again(monkeypatch):
    """Nothing of a profiled step is due to memory that none before it has touched."""
    monkeypatch.setitem(SHAPES, "tiny", CONFIG)
    build_loop, seen = measure.build_loop, []

    def watched(*arguments):
        loop = build_loop(*arguments)
        loss = loop.loss
        loop.loss = lambda batch: seen.append(batch) or loss(batch)
        return loop

    monkeypatch.setattr(measure, "build_loop", watched)
    result = measure.bench(config_of(), steps=3, shape="tiny", length=6, report=lambda line: None)
    assert len(seen) == 4 and seen[3] is seen[2] and seen[2] is not seen[1] and result["table"]


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux tells when a process started")
def test_the_process_start_is_known():
    code = "from mini_forge.bench.measure import process_start; print(*process_start(0.0), sep='|')"
    before = time.perf_counter()  # the system's monotonic clock, the same in the child
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    start, since = out.strip().split("|")
    assert before - 0.1 <= float(start) <= before + 5
    assert since == "the process started"


def test_without_it_the_call_counts(monkeypatch):
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    start, since = measure.process_start(7.0)
    assert start == 7.0
    assert "does not tell" in since


# The command


def test_bench_prints_one_object_and_leaves_no_run(config_file, tmp_path, capsys):
    assert main(["bench", str(config_file), "--steps", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == KEYS
    assert report["steps"] == len(report["step_seconds"]) == 4
    assert report["parameters"] == 2 * 272 * 32 + 18_432 + 5 * 32
    assert 0 < report["trained_tokens"] < report["tokens"]
    assert sum(row["share"] for row in report["table"]) == pytest.approx(1)
    groups = {row["group"] for row in report["table"]}
    assert GROUPS - {"dequantizing"} <= groups <= GROUPS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "rows.jsonl"]


@pytest.mark.parametrize("record, settings", [
    (CONFIG, ["use_4bit=true", "provider=unsloth", "gradient_checkpointing=true"]),
    (CONFIG, ["strategy=dpo", "precompute_reference=true"]),
    ({**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
      "head_dim": 8}, ["use_8bit=true"]),
])  # fmt: skip
def test_a_named_shape_needs_neither_model_nor_data(tmp_path, capsys, monkeypatch, record, settings):
    monkeypatch.setitem(SHAPES, "tiny", record)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "chat_template": "chatml", "lora_r": 4, "device": "cpu", "compute_specs": "low_end", "use_4bit": False,
        "optim": "adamw_torch", "gradient_accumulation_steps": 2,
    }))  # fmt: skip
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert main(["bench", str(path), "--shape", "tiny", "--length", "20", "--steps", "3", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    sides = 2 if "strategy=dpo" in settings else 1
    assert report["has_random_weights"]
    assert report["model"] == "tiny"
    assert report["tokens"] == report["trained_tokens"] == 3 * 2 * 20 * sides
    is_quantized = any(s in settings for s in ("use_4bit=true", "use_8bit=true"))
    assert is_quantized == any(row["group"] == "dequantizing" for row in report["table"])
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_bench_on_the_quickstart_for_a_person(capsys):
    assert (
        main(
            [
                "bench",
                str(ROOT / "configs" / "quickstart.json"),
                "--set",
                "per_device_train_batch_size=2",
                "--steps",
                "3",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    for part in ("device: ", "ops: plain", "model: ", "1,711,840 parameters", "matmul peak: ", "tokens/s: ", "% of the "
                 "matmul peak", "peak memory: ", "first step: ended ", "matrix products", "LoRA products"):  # fmt: skip
        assert part in out


@pytest.mark.parametrize("arguments, messages", [
    (["--shape", "llama-9000"], ["--shape: 'llama-9000' is not known; use one of smollm2-135m, "]),
    (["--steps", "2"], ["--steps: 2 must be at least 3"]),
    (["--steps", "0"], ["must be a whole number, at least 1"]),
    (["--length", "64"], ["--length: only with --shape"]),
    (["--steps", "1", "--length", "64"], ["--steps: 1", "--length: only"]),
    (["--set", "strategy=rlhf"], ['strategy: "rlhf" is not measured']),
    (["--shape", "smollm2-135m", "--set", "init_adapter=x"], ["init_adapter: 'x' has no meaning with --shape"]),
    (["--shape", "smollm2-135m", "--set", 'target_modules=["nope"]'], ["target_modules: 'nope'"]),
    (["--set", "model_name=/absent"], ["model_name: "]),
    (["--set", "lora_r=0"], ["lora_r: "]),
])  # fmt: skip
def test_wrong_input_is_a_line_each_and_exit_2(config_file, capsys, arguments, messages):
    assert main(["bench", str(config_file), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ")
        assert message in line


def test_a_signal_is_its_exit_code(config_file, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted(15)

    monkeypatch.setattr(measure, "bench", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(config_file)])
    assert stop.value.code == 143


def test_the_profiler_is_for_bench_alone():
    for path in (ROOT / "mini_forge").rglob("*.py"):
        modules = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        is_user = path.parent.name == "bench" or path.name == "cli.py"
        assert is_user or not any(m.startswith(("torch.profiler", "mini_forge.bench")) for m in modules), path
