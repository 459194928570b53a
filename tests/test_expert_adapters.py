"""Adapters of experts on disk: both layouts against the written definition, round trips, what is refused by name."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mini_forge
from mini_forge.errors import CheckpointError
from mini_forge.io.adapters import PREFIX, load_adapter, read_adapter_config, save_adapter
from mini_forge.io.expert_adapters import fuse, fused_tensors, per_expert_tensors, stack_targets
from mini_forge.io.merge import merge_adapter
from mini_forge.model.families.layout import InterleavedStacks, PerExpert, TransposedStacks
from mini_forge.model.lora import LoraSpec, LoRAStack, inject, lora_layers
from tests.golden_files import family

LAYOUTS = {
    "per expert": PerExpert(("gate_proj", "up_proj", "down_proj")),
    "transposed": TransposedStacks(),
    "interleaved": InterleavedStacks(),
}
MODELS = ("qwen3_moe_hub", "qwen3_moe_step", "mixtral_hub", "gpt_oss_hub", "gpt_oss_mxfp4", "llama4_text_hub",
          "llama4_multimodal")  # fmt: skip
STACKS = ("experts.gate_up_proj", "experts.down_proj")
OWNER = "model.layers.0.mlp.experts"


def adapted_stacks(E=3, D=4, F=2, R=2) -> dict[str, LoRAStack]:
    made = {}
    for i, (leaf, out, width) in enumerate([("gate_up_proj", 2 * F, D), ("down_proj", D, F)]):
        layer = LoRAStack(nn.Parameter(torch.zeros(E, out, width)), LoraSpec(R, 4))
        layer.lora_A.data = torch.randn(layer.lora_A.shape, generator=torch.Generator().manual_seed(i))
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i + 2))
        made[f"{OWNER}.{leaf}"] = layer
    return made


def adapted(name: str, targets=("q_proj", "v_proj", *STACKS), **spec):
    """A golden model with a random adapter."""
    folder, input_ids, _ = family(name)
    model, spec = mini_forge.load_model(folder), LoraSpec(**{"rank": 3, "alpha": 6, "targets": targets, **spec})
    inject(model, spec, torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    return model, spec, folder, input_ids


@pytest.fixture
def saved(tmp_path):
    """saved(name, layout="peft", **options) -> the run's folder, the model and its input_ids."""

    def save(name, layout="peft", **options):
        model, spec, folder, input_ids = adapted(name, **options)
        out = tmp_path / f"{name}_{layout}"
        out.mkdir()
        save_adapter(out, model, spec, str(folder), layout)
        return out, model, input_ids

    return save


def delta_by_pefts_rule(A, B, experts, out_first: bool):
    """PEFT 0.21's ParamWrapper, written out: A (R·E, in) is E blocks of R rows, B (out, R·E) is R blocks of E columns;
    ΔW_e = B_e A_e as the parameter lies: (out, in), or for a parameter (E, in, out) its "in" is what it ends with."""
    rank = len(A) // experts
    deltas = []
    for e in range(experts):
        total = torch.zeros(B.shape[0], A.shape[1])
        for k in range(rank):
            total += torch.outer(B[:, k * experts + e], A[e * rank + k])
        deltas.append(total if out_first else total.T)
    return torch.stack(deltas)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_fused_layout_means_the_same_update(kind):
    """ΔW of the stack as the checkpoint has it. PEFT takes the last dimension but one of (E, ·, ·) as `out` for
    (E, out, in); for Llama 4's (E, in, out) its factors come out the other way round. gpt-oss's update is (E, in, out)
    too, but PEFT knows it as transposed."""
    stacks = adapted_stacks()
    tensors = fused_tensors(stacks, LAYOUTS[kind])
    for stem, name in ((f"{OWNER}.base_layer", f"{OWNER}.gate_up_proj"), (OWNER, f"{OWNER}.down_proj")):
        layer = stacks[name]
        A, B = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        found = delta_by_pefts_rule(A, B, 3, out_first=kind != "transposed")
        expected = torch.einsum("eor,eri->eoi", layer.lora_B.data, layer.lora_A.data)
        if kind == "interleaved" and name.endswith("gate_up_proj"):  # gate and up rows by turns
            half = expected.shape[1] // 2
            order = [row for i in range(half) for row in (i, half + i)]
            expected = expected[:, order]
        torch.testing.assert_close(found, expected)
    assert len(tensors) == 4


@pytest.mark.parametrize("kind", LAYOUTS)
def test_fused_tensors_come_back_bit_for_bit(kind):
    stacks = adapted_stacks()
    extra = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}
    back = fuse({**fused_tensors(stacks, LAYOUTS[kind]), **extra}, list(stacks), 3, LAYOUTS[kind])
    assert back.keys() == {f"{name}.lora_{x}" for name in stacks for x in "AB"} | extra.keys()
    for name, layer in stacks.items():
        assert torch.equal(back[f"{name}.lora_A"], layer.lora_A.data)
        assert torch.equal(back[f"{name}.lora_B"], layer.lora_B.data)


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_one_stack_alone_is_the_outer_wrapper(leaf):
    stacks = {name: layer for name, layer in adapted_stacks().items() if name.endswith(leaf)}
    tensors = fused_tensors(stacks, LAYOUTS["per expert"])
    assert tensors.keys() == {f"{OWNER}.lora_A.weight", f"{OWNER}.lora_B.weight"}
    back = fuse(tensors, list(stacks), 3, LAYOUTS["per expert"])
    assert all(torch.equal(back[f"{name}.lora_B"], layer.lora_B.data) for name, layer in stacks.items())


def test_the_per_expert_layout_has_a_linear_adapter_for_every_matrix():
    stacks = adapted_stacks()
    tensors = per_expert_tensors(stacks)
    gate_up, down = (stacks[f"{OWNER}.{leaf}"] for leaf in ("gate_up_proj", "down_proj"))
    assert len(tensors) == 3 * 3 * 2
    parts = ("gate", gate_up, slice(0, 2)), ("up", gate_up, slice(2, 4)), ("down", down, slice(4))
    for e in range(3):
        for part, layer, rows in parts:
            assert torch.equal(tensors[f"{OWNER}.{e}.{part}_proj.lora_A.weight"], layer.lora_A[e].data)
            assert torch.equal(tensors[f"{OWNER}.{e}.{part}_proj.lora_B.weight"], layer.lora_B[e, rows].data)
    back = fuse(tensors, list(stacks), 3, None)
    for name, layer in stacks.items():
        assert torch.equal(back[f"{name}.lora_A"], layer.lora_A.data)
        assert torch.equal(back[f"{name}.lora_B"], layer.lora_B.data)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["peft", "per-expert"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_loads_with_the_same_factors_and_logits(saved, name, layout):
    run, model, input_ids = saved(name, layout)
    again = mini_forge.load_model(run)
    ours, theirs = dict(lora_layers(model)), dict(lora_layers(again))
    assert ours.keys() == theirs.keys() and any(".experts." in n for n in ours)
    for n, layer in ours.items():
        assert torch.equal(layer.lora_A, theirs[n].lora_A) and torch.equal(layer.lora_B, theirs[n].lora_B), n
    logits = model.logits(input_ids)
    assert torch.equal(again.logits(input_ids), logits)
    assert (logits - mini_forge.load_model(family(name)[0]).logits(input_ids)).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["peft", "per-expert"])
@pytest.mark.parametrize("targets", [STACKS[:1], STACKS[1:], ("o_proj", STACKS[1])])
def test_adapters_of_some_stacks_load_alone(saved, targets, layout):
    run, model, _ = saved("qwen3_moe_hub", layout, targets=targets)
    assert [n for n, _ in lora_layers(mini_forge.load_model(run))] == [n for n, _ in lora_layers(model)]


def test_the_record_of_the_fused_layout_names_parameters(saved):
    record = json.loads((saved("llama4_text_hub")[0] / "adapter_config.json").read_text())
    assert record["target_modules"] == ["q_proj", "v_proj"]
    # PEFT wraps in this order, and the first is innermost: it gets the `base_layer` name.
    assert record["target_parameters"] == ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    run = saved("gpt_oss_hub", targets=STACKS)[0]
    record = json.loads((run / "adapter_config.json").read_text())
    assert record["target_modules"] == []
    assert read_adapter_config(run)[0].targets == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def test_the_record_of_the_per_expert_layout_names_modules(saved):
    record = json.loads((saved("qwen3_moe_hub", "per-expert")[0] / "adapter_config.json").read_text())
    assert record["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    assert not record.get("target_parameters")


def test_an_adapter_without_stacks_says_nothing_of_parameters(saved):
    record = json.loads((saved("qwen3_moe_hub", targets=("q_proj",))[0] / "adapter_config.json").read_text())
    assert "target_parameters" not in record


def test_rslora_is_written_as_an_alpha_that_plain_readers_scale_alike(saved):
    run, model, input_ids = saved("qwen3_moe_hub", rank=4, use_rslora=True)
    record = json.loads((run / "adapter_config.json").read_text())
    assert (record["lora_alpha"], record["use_rslora"]) == (12, False)  # 6·√4, and 12/4 = 6/√4
    torch.testing.assert_close(mini_forge.load_model(run).logits(input_ids), model.logits(input_ids))


def names_of(*keys):
    return {f"{PREFIX}{key}.lora_A.weight": None for key in keys}


@pytest.mark.parametrize("targets, modules, expected", [
    (("q_proj", "mlp.experts.down_proj"), ["m.q_proj", "m.experts"], ("q_proj", "mlp.experts.down_proj")),
    (("gate_proj", "up_proj", "down_proj"), ["m.experts.0.gate_proj", "m.experts.0.up_proj", "m.experts.0.down_proj"],
     STACKS),
    (("q_proj", "down_proj"), ["m.q_proj", "m.experts.0.down_proj"], ("q_proj", STACKS[1])),
    # A dense layer's or a shared expert's modules of the same names stay targets.
    (("up_proj", "down_proj"), ["m.experts.0.up_proj", "m.experts.0.down_proj", "m.shared_expert.down_proj"],
     ("down_proj", *STACKS)),
    (None, ["m.experts.0.down_proj"], None),
])  # fmt: skip
def test_targets_of_per_expert_adapters_are_stacks_here(targets, modules, expected):
    assert stack_targets(targets, names_of(*modules)) == expected


def change(run, how):
    tensors = load_file(run / "adapter_model.safetensors")
    how(tensors)
    save_file(tensors, run / "adapter_model.safetensors")


FUSED = f"{PREFIX}model.layers.1.mlp.experts"


@pytest.mark.parametrize("how, message", [
    (lambda t: t.pop(f"{FUSED}.lora_B.weight"), r"missing \['model.layers.1.mlp.experts.down_proj.lora_A'"),
    (lambda t: [t.pop(f"{FUSED}.base_layer.lora_{x}.weight") for x in "AB"],
     r"2 tensors missing \['model.layers.1.mlp.experts.gate_up_proj.lora_A'"),
    (lambda t: t.update({f"{FUSED}.base_layer.base_layer.lora_A.weight": torch.zeros(1, 1)}),
     r"1 unexpected \['model.layers.1.mlp.experts.base_layer.base_layer.lora_A.weight'"),
    (lambda t: t.update({f"{PREFIX}model.layers.7.mlp.experts.lora_A.weight": torch.zeros(1, 1)}),
     r"1 unexpected \['model.layers.7.mlp.experts.lora_A.weight'"),
    (lambda t: t.update({f"{FUSED}.lora_A.weight": torch.zeros(23, 8)}), "experts.down_proj: factors .* 8 experts"),
    (lambda t: t.update({f"{FUSED}.lora_A.weight": torch.zeros(24, 9)}), "experts.down_proj.lora_A has shape"),
    (lambda t: t.update({f"{FUSED}.lora_A.weight": torch.zeros(16, 8), f"{FUSED}.lora_B.weight": torch.zeros(32, 16)}),
     "experts.down_proj.lora_A has shape"),  # another rank
    (lambda t: t.update({f"{FUSED}.lora_A.weight": torch.zeros(24)}), "experts.down_proj: factors"),
])  # fmt: skip
def test_fused_tensors_must_fit_exactly(saved, how, message):
    run, _, _ = saved("qwen3_moe_hub")
    change(run, how)
    with pytest.raises(CheckpointError, match=message):
        mini_forge.load_model(run)


@pytest.mark.parametrize("how, message", [
    (lambda t: t.pop(f"{FUSED}.3.up_proj.lora_B.weight"), "experts.3.up_proj.lora_B.weight"),
    (lambda t: t.pop(f"{FUSED}.7.down_proj.lora_A.weight"), "experts.7.down_proj.lora_A.weight"),
    (lambda t: t.update({f"{FUSED}.8.down_proj.lora_A.weight": torch.zeros(3, 8)}), "experts.8.down_proj.lora_A"),
    (lambda t: t.update({f"{PREFIX}model.layers.9.mlp.experts.0.up_proj.lora_A.weight": torch.zeros(3, 8)}),
     "layers.9.mlp.experts.0.up_proj.lora_A"),
    (lambda t: t[f"{FUSED}.2.up_proj.lora_A.weight"].add_(1), "another lora_A for gate_proj than for up_proj"),
    (lambda t: t.update({f"{FUSED}.2.down_proj.lora_A.weight": torch.zeros(2, 8)}), "experts.*down_proj"),
    (lambda t: t.update({f"{FUSED}.2.down_proj.lora_B.weight": torch.zeros(31, 3)}), "experts.*down_proj"),
])  # fmt: skip
def test_per_expert_tensors_must_fit_exactly(saved, how, message):
    run, _, _ = saved("qwen3_moe_hub", "per-expert")
    change(run, how)
    with pytest.raises(CheckpointError, match=message):
        mini_forge.load_model(run)


def test_an_adapter_of_another_number_of_experts_is_refused(saved, tmp_path):
    run, _, _ = saved("gpt_oss_hub")
    record = json.loads((run / "adapter_config.json").read_text())
    other = shutil.copytree(family("gpt_oss_hub")[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    tensors = load_file(other / "model.safetensors")
    (other / "config.json").write_text(json.dumps({**config, "num_local_experts": 2, "num_experts_per_tok": 2}))
    tensors = {n: t[:2].clone() if ".experts." in n or ".router." in n else t for n, t in tensors.items()}
    save_file(tensors, other / "model.safetensors")
    (run / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": str(other)}))
    with pytest.raises(CheckpointError, match="experts.* has shape"):
        mini_forge.load_model(run)


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_load_over_quantized_experts(saved, quantization):
    """The same factors; the logits are those of the quantized base with them."""
    run, model, input_ids = saved("qwen3_moe_hub")
    again = mini_forge.load_model(run, quantization=quantization)
    ours, theirs = dict(lora_layers(model)), dict(lora_layers(again))
    assert all(torch.equal(layer.lora_B, theirs[n].lora_B) for n, layer in ours.items())
    plain = mini_forge.load_model(family("qwen3_moe_hub")[0], quantization=quantization)
    assert (again.logits(input_ids) - plain.logits(input_ids)).abs().max() > 0.1


def test_load_adapter_takes_targets_of_its_own_spec(saved):
    """As run.py resumes: a spec in our names, over a folder in PEFT's."""
    run, model, _ = saved("llama4_text_hub")
    fresh = mini_forge.load_model(family("llama4_text_hub")[0])
    load_adapter(fresh, run, LoraSpec(3, 6, targets=("q_proj", "v_proj", *STACKS)))
    assert [n for n, _ in lora_layers(fresh)] == [n for n, _ in lora_layers(model)]


def test_swapping_and_interleaving_are_the_layouts_word():
    """A layout says two things of adapters; any other is refused by absence, not guessed."""
    said = {kind: (layout.swaps_factors, layout.interleaves) for kind, layout in LAYOUTS.items()}
    assert said == {"per expert": (False, False), "transposed": (True, False), "interleaved": (False, True)}
    with pytest.raises(AttributeError):
        fused_tensors(adapted_stacks(), SimpleNamespace())


@pytest.mark.parametrize("targets", [("layers.0.self_attn.q_proj",), ("q_proj", "layers.1.mlp.experts.down_proj")])
def test_targets_of_some_layers_only_are_saved_by_their_full_names(targets, tmp_path):
    folder, ids, _ = family("qwen3_moe_hub")
    model, spec = mini_forge.load_model(folder), LoraSpec(2, 4, 0.1, targets)
    inject(model, spec)
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(i))
    save_adapter(tmp_path, model, spec, str(folder))
    again = mini_forge.load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.logits(ids), model.eval().logits(ids))
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    if any("experts" in target for target in targets):
        assert record["lora_dropout"] == 0.0  # PEFT refuses dropout beside target_parameters
    merge_adapter(tmp_path, tmp_path / "merged")


def test_mixtrals_experts_are_named_as_its_files_name_them(saved):
    out, model, input_ids = saved("mixtral_hub", "per-expert")
    tensors = load_file(out / "adapter_model.safetensors")
    owner, layer = f"{PREFIX}model.layers.0.block_sparse_moe.experts", model.model.layers[0].mlp.experts
    width = layer.down_proj.shape[2]
    for part, stack, rows in (("w1", layer.gate_up_proj, slice(width)), ("w3", layer.gate_up_proj, slice(width, None)),
                              ("w2", layer.down_proj, slice(None))):  # fmt: skip
        assert torch.equal(tensors[f"{owner}.1.{part}.lora_A.weight"], stack.lora_A[1].data)
        assert torch.equal(tensors[f"{owner}.1.{part}.lora_B.weight"], stack.lora_B[1, rows].data)
    record = json.loads((out / "adapter_config.json").read_text())
    assert record["target_modules"] == ["q_proj", "v_proj", "w1", "w2", "w3"] and "target_parameters" not in record
    assert torch.equal(mini_forge.load_model(out).logits(input_ids), model.logits(input_ids))


@pytest.mark.parametrize("name", ["qwen3_moe_hub", "mixtral_hub"])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_experts_stored_in_stacks_are_those_stored_one_by_one(name, quantization, tmp_path):
    """transformers 5 holds them so, and can save them so; also in memory, in few bits, and merged."""
    folder, input_ids, _ = family(name)
    plain = mini_forge.load_model(folder)
    stacked = tmp_path / "stacked"
    shutil.copytree(folder, stacked)
    save_file({n: p.data.contiguous() for n, p in plain.named_parameters()}, stacked / "model.safetensors")
    one, other = (mini_forge.load_model(path, quantization=quantization) for path in (folder, stacked))
    kind = type(one.model.layers[-1].mlp.experts.down_proj)
    assert type(other.model.layers[-1].mlp.experts.down_proj) is kind
    assert (kind is nn.Parameter) == (quantization is None)
    assert torch.equal(one.logits(input_ids), other.logits(input_ids))
    if quantization is None:
        spec = LoraSpec(3, 6, targets=STACKS)
        inject(other, spec, torch.Generator().manual_seed(0))
        for _, layer in lora_layers(other):
            layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        save_adapter(tmp_path / "run", other, spec, str(stacked))
        merged = mini_forge.load_model(merge_adapter(tmp_path / "run", tmp_path / "merged"))
        torch.testing.assert_close(merged.logits(input_ids), other.logits(input_ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", *STACKS), ("q_proj", "v_proj", STACKS[1])])
@pytest.mark.parametrize("name", ["qwen3_moe_hub", "gpt_oss_hub"])
def test_a_pattern_may_stand_beside_parameters(saved, name, targets):
    out, model, input_ids = saved(name, targets=targets)
    record = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**record, "target_modules": r".*\.(q_proj|v_proj)"}))
    assert torch.equal(mini_forge.load_model(out).logits(input_ids), model.logits(input_ids))
