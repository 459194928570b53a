"""PEFT-format adapters: written, read back, refused when they do not fit; and merged models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mini_forge
from mini_forge.cli import main
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.io.adapters import fill_adapter, read_adapter_config, save_adapter
from mini_forge.io.merge import merge_adapter
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from tests.golden_files import family
from tests.test_weights import split_in_two, store_in_4bit
from tests.tiny import make_unreadable, write_checkpoint

IDS = torch.arange(12)[None]


def adapted(base, **spec):
    model = mini_forge.load_model(base)
    spec = LoraSpec(**{"rank": 4, "alpha": 8, **spec})
    inject(model, spec, torch.Generator().manual_seed(9))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return model, spec


@pytest.fixture
def run(tiny, tmp_path):
    model, spec = adapted(tiny)
    folder = tmp_path / "run"
    folder.mkdir()
    save_adapter(folder, model, spec, str(tiny))
    return folder


def test_saved_adapter_loads_with_the_same_logits(tiny, run):
    assert torch.equal(mini_forge.load_model(run).logits(IDS), adapted(tiny)[0].logits(IDS))


def test_files_are_pefts(run):
    tensors = load_file(run / "adapter_model.safetensors")
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    assert shapes["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] == [4, 32]
    assert shapes["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"] == [16, 4]
    assert len(shapes) == 28
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    record = json.loads((run / "adapter_config.json").read_text())
    assert (record["peft_type"], record["task_type"], record["r"], record["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 8)
    assert record["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_rslora_is_written_as_an_alpha_that_plain_readers_scale_alike(tiny, tmp_path):
    model, spec = adapted(tiny, use_rslora=True)
    save_adapter(tmp_path, model, spec, str(tiny))
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (record["lora_alpha"], record["use_rslora"]) == (16, False)  # 8·√4, and 16/4 = 8/√4
    torch.testing.assert_close(mini_forge.load_model(tmp_path).logits(IDS), model.logits(IDS))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(next(iter(t))), "1 tensors missing"),
    (lambda t: t.update({"base_model.model.extra.lora_A.weight": torch.zeros(1)}), "1 unexpected"),
    (lambda t: t.update({k: t[k][:, :3].contiguous() for k in list(t)[:1]}), "has shape"),
])  # fmt: skip
def test_tensors_must_fit_exactly(run, change, message):
    tensors = load_file(run / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, run / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{message}.*; give the base it was trained on"):
        mini_forge.load_model(run)


@pytest.mark.parametrize("key, value, message", [
    ("use_dora", True, "use_dora = True is not supported"),
    ("modules_to_save", ["lm_head"], "modules_to_save"),
    ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
    ("bias", "all", "bias = 'all'"),
    ("init_lora_weights", "pissa_niter_4", "init_lora_weights = 'pissa_niter_4'"),
    ("init_lora_weights", "olora", "init_lora_weights = 'olora'"),
    ("peft_type", "IA3", "peft_type 'IA3'"),
    ("task_type", "SEQ_CLS", "that of a reward model"),
    ("r", None, "needs numbers `r`"),
    ("r", True, "r True.*needs numbers `r`"),
    ("lora_alpha", "16", "lora_alpha '16'"),
    ("lora_dropout", "x", "lora_dropout 'x' must be a number"),
    ("target_modules", 5, "target_modules 5 must be a list of names"),
    ("target_modules", [5], r"target_modules \[5\] must be a list of names"),
    ("target_parameters", 5, "target_parameters 5 must be a list of names"),
    ("base_model_name_or_path", 5, "base_model_name_or_path 5 must be a text"),
])  # fmt: skip
def test_what_would_change_the_mathematics_is_refused(run, key, value, message):
    record = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**record, key: value}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter_config(run)


def test_broken_and_absent_adapter_files_are_named(tiny, run):
    model, _ = adapted(tiny)
    (run / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="broken safetensors"):
        fill_adapter(model, run)
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="file not found"):
        fill_adapter(model, run)
    make_unreadable(run / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot be read"):
        fill_adapter(model, run)


def test_merged_folder_gives_the_adapters_logits_and_keeps_the_rest(tiny, run, tmp_path):
    out = merge_adapter(run, tmp_path / "merged")
    torch.testing.assert_close(
        mini_forge.load_model(out).logits(IDS), mini_forge.load_model(run).logits(IDS), rtol=1e-4, atol=1e-4
    )
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if not n.endswith("_proj.weight"))
    assert (out / "tokenizer.json").exists()


def test_merging_keeps_shards_and_their_index(tiny, run, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "sharded")
    split_in_two(base)
    record = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": str(base)}))
    one, two = merge_adapter(run, tmp_path / "merged"), load_file
    merged = two(one / "a.safetensors") | two(one / "b.safetensors")
    assert (one / "model.safetensors.index.json").exists()
    torch.testing.assert_close(mini_forge.load_model(one).logits(IDS), mini_forge.load_model(run).logits(IDS),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert len(merged) == len(load_file(tiny / "model.safetensors"))


def test_a_base_stored_in_4_bits_is_made_dense_before_merging(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    store_in_4bit(base, nested=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    model, spec = adapted(base)
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", model, spec, str(base))
    out = merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not any("absmax" in name for name in load_file(out / "model.safetensors"))
    torch.testing.assert_close(mini_forge.load_model(out).logits(IDS), model.logits(IDS), rtol=1e-4, atol=1e-4)


def test_merge_refuses_a_full_folder_and_a_plain_model(tiny, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        merge_adapter(run, tmp_path / "full")
    assert (tmp_path / "full" / "precious").read_text() == "x"
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        merge_adapter(tiny, tmp_path / "new")
    with pytest.raises(ConfigError, match="name too long.*; name another folder"):
        merge_adapter(run, tmp_path / ("x" * 300))


def test_an_adapter_without_a_base_says_so(run):
    record = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": ""}))
    with pytest.raises(CheckpointError, match="base_model_name_or_path is empty"):
        mini_forge.load_model(run)


def test_files_have_the_users_own_permissions(run, tmp_path):
    (tmp_path / "plain").write_text("")
    assert (run / "adapter_model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_pattern_s_modules_are_those_that_have_tensors(tiny, run):
    record = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**record, "target_modules": r"model\..*_proj"}))
    spec, _ = read_adapter_config(run)
    assert len(spec.targets) == 14 and "model.layers.1.mlp.down_proj" in spec.targets
    assert torch.equal(mini_forge.load_model(run).logits(IDS), adapted(tiny)[0].logits(IDS))


def multimodal(folder):
    """The golden Gemma 3 as the text part of a multimodal checkpoint, with a tensor of its vision tower."""
    text, ids, _ = family("gemma3_text_hub")
    folder.mkdir()
    config = json.loads((text / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 8}}
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(text / "model.safetensors").items()}
    tensors["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(8, 8)
    save_file(tensors, folder / "model.safetensors")
    return folder, text, ids


def test_an_adapter_of_a_multimodal_model_has_the_names_of_its_class(tmp_path):
    """transformers' AutoModelForCausalLM makes the multimodal class of such a checkpoint, and PEFT names by that; short
    targets would name the vision tower's layers too."""
    base, text, ids = multimodal(tmp_path / "base")
    model, spec = adapted(base, targets=("q_proj", "down_proj"))
    save_adapter(tmp_path / "run", model, spec, str(base))
    layers = len(model.model.layers)
    modules = [f"model.language_model.layers.{i}.{name}" for i in range(layers)
               for name in ("self_attn.q_proj", "mlp.down_proj")]  # fmt: skip
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert names == {f"base_model.model.{module}.lora_{letter}.weight" for module in modules for letter in "AB"}
    record = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert record["target_modules"] == sorted(modules)
    wanted = model.logits(ids)
    assert torch.equal(mini_forge.load_model(tmp_path / "run").logits(ids), wanted)
    # As others may write the same: by a pattern, or with short names.
    for targets in (r".*language_model.*\.(q|down)_proj", ["q_proj", "down_proj"]):
        (tmp_path / "run" / "adapter_config.json").write_text(json.dumps({**record, "target_modules": targets}))
        assert torch.equal(mini_forge.load_model(tmp_path / "run").logits(ids), wanted)
    merged = merge_adapter(tmp_path / "run", tmp_path / "merged")
    torch.testing.assert_close(mini_forge.load_model(merged).logits(ids), wanted, atol=0.05, rtol=0)  # bfloat16
    # Of the text part alone the same adapter has the plain names.
    model, spec = adapted(text, targets=("q_proj", "down_proj"))
    save_adapter(tmp_path / "text", model, spec, str(text))
    record = json.loads((tmp_path / "text" / "adapter_config.json").read_text())
    assert record["target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.parametrize("extra", [
    "model.embed_tokens.lora_embedding_A", "lm_head.weight", "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    "model.layers.0.self_attn.q_proj.lora_B.bias", "model.layers.1.mlp.router.lora_B.weight",
])  # fmt: skip
@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_tensor_that_would_be_left_out_is_refused(run, tmp_path, extra, command, capsys):
    if command == "export":
        pytest.importorskip("gguf")
    tensors = load_file(run / "adapter_model.safetensors")
    tensors[f"base_model.model.{extra}"] = torch.ones(4)
    save_file(tensors, run / "adapter_model.safetensors")
    assert main([command, str(run), str(tmp_path / "out.gguf")]) == 2
    assert f"1 tensors that are no update of the decoder's layers, among them {extra}" in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()
