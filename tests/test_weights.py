"""Reading checkpoints: sound ones in every layout, and every way in which one can be unsound."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mini_forge
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.io import weights
from mini_forge.io.adapters import save_adapter
from mini_forge.io.hub import resolve_model
from mini_forge.io.merge import largest_difference, merge_adapter
from mini_forge.io.weights import Checkpoint, load_base
from mini_forge.model.families import decoder_spec
from mini_forge.model.lora import LoraSpec, inject
from mini_forge.model.quant import Linear4bit, Linear8bit, quantize_4bit, quantize_8bit
from tests.tiny import make_unreadable, random_model, write_checkpoint


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def split_in_two(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, own in shards.items():
        save_file({n: tensors[n] for n in own}, folder / shard)
    index = {"weight_map": {n: shard for shard, own in shards.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_loaded_weights_are_the_files(tiny):
    model, stored = mini_forge.load_model(tiny), load_file(tiny / "model.safetensors")
    assert dict(model.named_parameters()).keys() == stored.keys()
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_shards_load_as_one(folder, tiny):
    split_in_two(folder)
    ids = torch.arange(8)[None]
    assert torch.equal(mini_forge.load_model(folder).logits(ids), mini_forge.load_model(tiny).logits(ids))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd.safetensors", "sub/x.safetensors", "x.bin"])
def test_shard_names_that_leave_the_folder_are_refused(folder, name):
    split_in_two(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="leaves the model folder"):
        mini_forge.load_model(folder)


def test_pickles_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*run any code.*safetensors"):
        mini_forge.load_model(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.norm.weight"), "1 tensors are missing.*model.norm.weight"),
    (lambda t: t.update({"vision.weight": torch.zeros(2)}), "unexpected tensor 'vision.weight'"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"'model.norm.weight' has shape \[3\].*\[32\]"),
])  # fmt: skip
def test_tensors_must_fit_the_config(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("keep_bytes", [0, 5, 100, 20000])
def test_a_file_cut_short_is_refused(folder, keep_bytes):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(CheckpointError, match="cut short|broken|past the end"):
        mini_forge.load_model(folder)


def test_header_sizes_are_checked(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [31]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"shape \[31\] cannot have 128 bytes"):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("breakage, message", [
    (lambda f: (f / "config.json").unlink(), "config.json: file not found"),
    (lambda f: (f / "config.json").write_text('{\n"a": 1,}'), "config.json:2: not JSON: .*; .*, or copy it again"),
    (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object"),
    (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
])  # fmt: skip
def test_broken_folders_are_named(folder, breakage, message):
    breakage(folder)
    with pytest.raises(CheckpointError, match=message):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_cannot_be_read_are_named(folder, name):
    make_unreadable(folder / name)
    with pytest.raises(
        CheckpointError, match=f"{name}: cannot be read .*error.*; (give a folder that can be read|check the file)"
    ):
        mini_forge.load_model(folder)


def test_a_header_that_is_json_but_no_object_is_refused(folder):
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(CheckpointError, match="broken safetensors header"):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "/absent/model", "x" * 300, "./a\0b"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_refused(name):
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_model(name)


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch, tiny):
    root = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tiny, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    from huggingface_hub import _snapshot_download

    assert str(tmp_path / "hub") == _snapshot_download.constants.HF_HUB_CACHE
    assert (resolve_model("some/model") / "config.json").exists()


def test_an_unreachable_hub_id_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'no/such' is neither a folder nor in the local hub cache"):
        resolve_model("no/such")


@pytest.mark.parametrize("quantization, kind", [("nf4", Linear4bit), ("fp4", Linear4bit), ("int8", Linear8bit)])
def test_quantized_on_arrival_but_not_the_head(tiny, quantization, kind):
    model = mini_forge.load_model(tiny, quantization=quantization)
    linears = [m for m in model.modules() if isinstance(m, kind)]
    assert len(linears) == 14
    assert type(model.lm_head) is torch.nn.Linear
    dense = mini_forge.load_model(tiny)
    ids = torch.arange(12)[None]
    error = (model.logits(ids) - dense.logits(ids)).norm() / dense.logits(ids).norm()
    assert 0 < error < 0.3


def test_biases_survive_quantization(tmp_path):
    folder = write_checkpoint(tmp_path / "m", model_type="qwen2")
    model, stored = mini_forge.load_model(folder, quantization="nf4"), load_file(folder / "model.safetensors")
    assert torch.equal(model.model.layers[0].self_attn.k_proj.bias, stored["model.layers.0.self_attn.k_proj.bias"])


def test_unknown_quantization_is_refused(tiny):
    with pytest.raises(ConfigError, match="'int3'"):
        mini_forge.load_model(tiny, quantization="int3")


def store_in_4bit(folder, nested):
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        linear = Linear4bit.from_weight(tensors.pop(name), None, quant_type="nf4", nested=nested,
                                        compute_dtype=torch.float32)  # fmt: skip
        tensors |= {name.removesuffix("weight") + key: t for key, t in linear.state().items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_stored_in_4bit_load_as_they_are_or_dense(folder, tiny, nested):
    store_in_4bit(folder, nested)
    ids = torch.arange(12)[None]
    stored = mini_forge.load_model(folder, quantization="nf4")
    arrived = mini_forge.load_model(tiny, quantization="nf4", nested=nested)
    assert torch.equal(stored.logits(ids), arrived.logits(ids))
    dense = mini_forge.load_model(folder)
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(dense.logits(ids), stored.logits(ids))
    with pytest.raises(CheckpointError, match="stored as nf4, not fp4; set use_4bit, and bnb_4bit_quant_type to .nf4."):
        mini_forge.load_model(folder, quantization="fp4")


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_tied_checkpoints_may_or_may_not_store_the_head(tmp_path, quantization, monkeypatch):
    monkeypatch.setattr(weights, "DENSE_BYTES", 4096)  # several pieces
    folder, ids = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True), torch.arange(5)[None]
    logits = mini_forge.load_model(folder, quantization=quantization).logits(ids)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t.update({"lm_head.weight": embedding}))
    assert torch.equal(mini_forge.load_model(folder, quantization=quantization).logits(ids), logits)


def test_a_tied_matrix_may_be_stored_as_the_head_alone(tmp_path):
    folder = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    expected = mini_forge.load_model(folder).logits(torch.arange(9)[None])
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(mini_forge.load_model(folder).logits(torch.arange(9)[None]), expected)
    run = tmp_path / "run"
    model, spec = mini_forge.load_model(folder), LoraSpec(2, 4)
    inject(model, spec)
    save_adapter(run, model, spec, str(folder))
    merged = merge_adapter(run, tmp_path / "merged")
    assert torch.equal(mini_forge.load_model(merged).logits(torch.arange(9)[None]), expected)
    assert largest_difference(run, merged)[0] == 0


@pytest.mark.parametrize("record", ["[]", "null", '{"a": 3}', "{}"])
def test_an_index_that_names_no_files_is_refused(folder, record):
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {record}}}')
    with pytest.raises(CheckpointError, match="index.json: weight_map must name each tensor's file; fetch it again"):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "hqq", 5])
def test_a_quantization_of_another_kind_is_refused_by_its_name(folder, method):
    change_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=f"quantization_config is {method!r}, which is not supported; take the"):
        mini_forge.load_model(folder)
    inner = {"model_type": "gemma3_text", "quantization_config": {"quant_method": method}}
    with pytest.raises(CheckpointError, match=f"quantization_config is {method!r}"):
        decoder_spec({"model_type": "gemma3", "text_config": inner})


@pytest.mark.parametrize("change", [lambda head: head.index_fill(0, torch.tensor([271]), 0.5), lambda head: head[:-1]])
def test_a_head_that_is_tied_must_be_the_embedding(tmp_path, change):
    """transformers unties such a model; a trained matrix must not be dropped unseen."""
    folder = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": change(t["model.embed_tokens.weight"]).clone()}))
    with pytest.raises(CheckpointError, match="lm_head.weight is not the embedding, .* set it to false"):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_may_be_stored_narrower_and_with_nan(tmp_path, dtype):
    folder = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)

    def change(tensors):
        tensors["model.embed_tokens.weight"][270] = torch.nan  # a row that is never used
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16()

    rewrite(folder, change)
    mini_forge.load_model(folder, dtype=dtype)


def test_dtype_none_keeps_the_stored_one(tmp_path):
    folder = write_checkpoint(tmp_path / "bf16")
    rewrite(folder, lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    assert mini_forge.load_model(folder, dtype=None).model.norm.weight.dtype == torch.bfloat16
    assert mini_forge.load_model(folder).model.norm.weight.dtype == torch.float32


def test_tensors_are_read_in_file_order(tiny):
    starts = [e.start for e in Checkpoint(tiny).entries.values()]
    assert starts == sorted(starts)


def test_random_model_helper_covers_every_parameter():
    assert all(p.std() > 0 for p in random_model().parameters())


def test_an_integer_weight_without_scales_is_refused(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32, dtype=torch.int8)}))
    for quantization in (None, "nf4"):
        with pytest.raises(CheckpointError, match="stored as torch.int8 in a form that is not known"):
            mini_forge.load_model(folder, quantization=quantization)


@pytest.mark.parametrize("nested", [False, True])
def test_layers_stored_in_4bit_may_lie_over_several_files(folder, nested):
    store_in_4bit(folder, nested)
    whole = mini_forge.load_model(folder, quantization="nf4").state_dict()
    split_in_two(folder)
    parts = mini_forge.load_model(folder, quantization="nf4").state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_layers_stored_in_4bit_must_fit_the_config(folder, quantization):
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 64)}))
    store_in_4bit(folder, nested=False)
    with pytest.raises(CheckpointError, match=r"1.mlp.up_proj.weight: stored as \[64, 64\], .* asks for \[64, 32\]"):
        mini_forge.load_model(folder, quantization=quantization)


def test_layers_stored_in_8bit_load_as_they_are_or_dense(folder):
    name, weight = "model.layers.0.mlp.up_proj", torch.tensor([[127, -64], [1, 0]], dtype=torch.int8).repeat(32, 16)
    stored = {name + ".weight": weight, name + ".SCB": torch.full((64,), 2.0), name + ".weight_format": torch.tensor(0)}
    rewrite(folder, lambda t: t.update(stored))
    with pytest.raises(CheckpointError, match="stored as int8, not nf4; set use_8bit"):
        mini_forge.load_model(folder, quantization="nf4")
    layer = mini_forge.load_model(folder, quantization="int8").get_submodule(name)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.SCB, stored[name + ".SCB"])
    dense = mini_forge.load_model(folder).get_submodule(name).weight
    torch.testing.assert_close(dense, weight.float() * 2 / 127)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_quantized_as_they_are_in_the_training_dtype(folder, stored, dtype):
    rewrite(folder, lambda t: t.update({n: x.to(stored) for n, x in t.items()}))
    name = "model.layers.0.mlp.up_proj"
    weight = load_file(folder / "model.safetensors")[name + ".weight"].to(dtype)
    layer = mini_forge.load_model(folder, dtype=dtype, quantization="nf4").get_submodule(name)
    expected = quantize_4bit(weight)
    assert torch.equal(layer.packed, expected.packed) and torch.equal(layer.absmax, expected.stored_absmax)
    assert layer.weight_dtype == dtype and layer.dequantized().dtype == dtype
    layer = mini_forge.load_model(folder, dtype=dtype, quantization="int8").get_submodule(name)
    packed, scale = quantize_8bit(weight)
    assert torch.equal(layer.weight, packed) and torch.equal(layer.SCB, scale)


def both_errors(folder, **options):
    """What loading says and what the headers alone say."""
    lines = []
    for headers_only in (False, True):
        with pytest.raises(CheckpointError) as error:
            load_base(folder, headers_only=headers_only, **options)
        lines.append(str(error.value))
    return lines


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", [
    lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")),
    lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
    lambda f: change_config(f, num_hidden_layers=9),
    lambda f: change_config(f, head_dim=6),
    lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:20000]),
    lambda f: (f / "model.safetensors").write_bytes(b"junk" * 99),
    lambda f: (f / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
    lambda f: (f / "model.safetensors").write_bytes(
        (62).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets":[0, 4]}}1234'),
    lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
])  # fmt: skip
def test_headers_alone_tell_what_loading_tells(folder, damage):
    damage(folder)
    told, beforehand = both_errors(folder)
    assert beforehand == told and "\n" not in told


def test_headers_alone_tell_of_layers_stored_in_few_bits(folder):
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 64)}))
    store_in_4bit(folder, nested=True)
    told, beforehand = both_errors(folder, quantization="nf4")
    assert beforehand == told and "asks for [64, 32]" in told
    rewrite(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight.quant_map"))
    told, beforehand = both_errors(folder, quantization="nf4")
    assert beforehand == told and "quant_map" in told


def test_headers_alone_leave_a_decoder_without_memory(folder, monkeypatch):
    monkeypatch.setattr("mini_forge.io.reading.read_tensor", None)
    model = load_base(folder, quantization="nf4", headers_only=True)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("wrong, message", [
    ({"dtype": "float32"}, "dtype: 'float32' must be one of None, torch.float32"),
    ({"dtype": torch.int8}, "dtype: torch.int8 must be"),
    ({"dtype": torch.float8_e4m3fn}, "dtype: torch.float8_e4m3fn must be"),
    *(({"device": device}, f"device: {device!r} cannot be used") for device in ("zz", "hpu", 1.5, None, 2**70)),
    ({"device": "meta"}, "device: 'meta' holds no numbers"),
    ({"quantization": "int7"}, "quantization: 'int7' must be one of"),
])  # fmt: skip
def test_load_model_refuses_what_is_no_dtype_device_or_quantization(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        mini_forge.load_model(tmp_path, **wrong)


def with_header(folder, change):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + size].decode()).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_tensors_that_lie_over_each_other_are_refused(folder):
    def overlap(text):
        header = json.loads(text)
        first, second = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
        header[second]["data_offsets"] = header[first]["data_offsets"]
        return json.dumps(header)

    with_header(folder, overlap)
    with pytest.raises(CheckpointError, match="lie over each other; fetch it again"):
        mini_forge.load_model(folder)


def test_a_name_that_stands_twice_is_refused(folder):
    with_header(folder, lambda text: text.replace("layers.1.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match="broken safetensors header .a name stands in it twice.; fetch it again"):
        mini_forge.load_model(folder)


@pytest.mark.parametrize("shape", [[2**70], [2**64, 0], [2**32, 2**32]])
def test_a_size_beyond_all_files_is_refused(folder, shape):
    def grow(text):
        header = json.loads(text)
        header["model.norm.weight"]["shape"] = shape
        return json.dumps(header)

    with_header(folder, grow)
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        mini_forge.load_model(folder)


def test_a_billion_layers_are_not_made(folder):
    change_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="num_hidden_layers 1000000000 must be at most 10000"):
        mini_forge.load_model(folder)
