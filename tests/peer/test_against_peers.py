"""Live checks against transformers and PEFT; skipped where they are not installed (they never are a dependency).

pip install -r tests/golden/requirements-peers.txt     # beside mini_forge, in an environment of its own
python -m pytest tests/peer
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: see tests/peer")
peft = pytest.importorskip("peft", reason="peft is not installed: see tests/peer")

import mini_forge  # noqa: E402
from mini_forge.io.adapters import save_adapter  # noqa: E402
from mini_forge.model.lora import LoraSpec, inject, lora_layers  # noqa: E402
from tests import golden_files as golden  # noqa: E402
from tests.test_golden_training import settings  # noqa: E402

# float32 sums in another order differ by about 1e-6 of the logits' spread.
TOLERANCE = 2e-4
IDS = torch.randint(0, 320, (2, 33), generator=torch.Generator().manual_seed(3))


def worst(logits, expected) -> float:
    return float((logits - expected).abs().max() / expected.std())


def peer_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A copy, so that the repository stays as it is."""
    return shutil.copytree(golden.BASE, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module", params=["plain", "rslora", "two modules"])
def run(request, base, tmp_path_factory):
    """A run folder of ours, after five steps at a rate that moves the adapter far from its start."""
    options = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "two modules": {"target_modules": ["q_proj", "v_proj"]},
    }[request.param]
    config = settings("dense", 8, 1, model_name=str(base), num_train_epochs=5, learning_rate=2e-2)
    config |= {"output_dir": str(tmp_path_factory.mktemp("run") / "run"), "init_adapter": None, **options}
    return mini_forge.train(mini_forge.TrainingConfig.from_dict(config)).output_dir


@torch.no_grad()
def our_logits(folder):
    return mini_forge.load_model(folder).logits(IDS)


@torch.no_grad()
def test_adapter_loads_in_peft_whole_and_with_the_same_logits(run, base):
    model = peft.PeftModel.from_pretrained(peer_model(base), run)
    wanted = set(peft.utils.get_peft_model_state_dict(model))
    assert wanted == set(load_file(run / "adapter_model.safetensors"))
    logits = model(IDS).logits
    assert worst(our_logits(run), logits) < TOLERANCE
    with model.disable_adapter():
        assert worst(model(IDS).logits, logits) > 0.05  # the adapter does something


@torch.no_grad()
def test_merged_model_loads_in_transformers_with_the_same_logits(run, base, tmp_path):
    """And with the weights of PEFT's own merge in float32, rounded to the checkpoint's bfloat16 as ours are."""
    out = tmp_path / "merged"
    subprocess.run(
        [sys.executable, "-m", "mini_forge", "merge", str(run), str(out)], check=True, stdout=subprocess.PIPE
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = peft.PeftModel.from_pretrained(peer_model(base), run).merge_and_unload().bfloat16().float()
    for (name, ours), expected in zip(model.named_parameters(), theirs.parameters(), strict=True):
        # A float32 sum that falls on the edge between two bfloat16 values may go either way.
        assert torch.allclose(ours, expected, rtol=2**-7, atol=1e-6), name
        assert (ours != expected).float().mean() < 1e-3, name
    assert worst(our_logits(out), model(IDS).logits) < TOLERANCE


@torch.no_grad()
def test_merging_a_float32_base_changes_no_logit(run, base, tmp_path):
    """Without rounding to bfloat16, merged in transformers equals adapter in PEFT."""
    wide = shutil.copytree(base, tmp_path / "wide")
    tensors = {name: tensor.float() for name, tensor in load_file(wide / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(run / "adapter_model.safetensors", adapter)
    record = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(wide)}
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    out = tmp_path / "merged"
    subprocess.run([sys.executable, "-m", "mini_forge", "merge", str(adapter), str(out)], check=True)
    expected = peft.PeftModel.from_pretrained(peer_model(wide), adapter)(IDS).logits
    assert worst(peer_model(out)(IDS).logits, expected) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", golden.FAMILIES)
def test_logits_equal_transformers_on_other_tokens(name, attention):
    """The golden checkpoints, live, on more rows and more tokens than were stored."""
    if attention == "sdpa" and name.startswith("gpt_oss"):
        pytest.skip("transformers has no SDPA with sinks")
    folder = golden.family(name)[0]
    options = {"dtype": torch.float32, "attn_implementation": attention}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    input_ids = torch.randint(0, model.config.vocab_size, (3, 61), generator=torch.Generator().manual_seed(11))
    assert worst(mini_forge.load_model(folder).logits(input_ids), model(input_ids).logits) < TOLERANCE


# Models with experts.
MOE = [name for name in golden.FAMILIES if name.startswith(("qwen3_moe", "gpt_oss", "llama4", "mixtral"))]
TARGETS = ("q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj")


def save_moe_adapter(name, out, targets, layout="peft"):
    """A golden model of ours with a random adapter far from nothing, saved in `out`; its logits on IDS."""
    folder = golden.family(name)[0]
    model, spec = mini_forge.load_model(folder), LoraSpec(3, 6, targets=targets)
    inject(model, spec, torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    out.mkdir()
    save_adapter(out, model, spec, str(folder), layout)
    return folder, model.logits(IDS % model.spec.vocab_size)


@torch.no_grad()
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[2:], TARGETS[:1] + TARGETS[3:], TARGETS[2:3]])
@pytest.mark.parametrize("name", MOE)
def test_adapters_of_experts_load_in_peft_whole_and_with_the_same_logits(name, targets, tmp_path):
    folder, logits = save_moe_adapter(name, tmp_path / "run", targets)
    model = peft.PeftModel.from_pretrained(peer_model(folder), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert set(peft.utils.get_peft_model_state_dict(model)) == set(saved)
    for key, tensor in peft.utils.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, saved[key]), key
    input_ids = IDS % model.config.get_text_config().vocab_size
    assert worst(logits, model(input_ids).logits) < TOLERANCE
    with model.disable_adapter():
        assert worst(model(input_ids).logits, logits) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[2:]])
@pytest.mark.parametrize("name", [name for name in MOE if name.startswith(("qwen3_moe", "mixtral"))])
def test_per_expert_adapters_load_in_peft_whole_and_with_the_same_logits(name, targets, tmp_path, recwarn):
    """PEFT itself fuses them over transformers' stacks: twice the rank for gate_up, whose halves have each their A."""
    folder, logits = save_moe_adapter(name, tmp_path / "run", targets, "per-expert")
    model = peft.PeftModel.from_pretrained(peer_model(folder), tmp_path / "run")
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    factors = [tensor for key, tensor in peft.utils.get_peft_model_state_dict(model).items() if "lora_B" in key]
    assert factors and all((tensor != 0).any(dim=1).all() for tensor in factors)  # PEFT starts B at 0
    assert worst(logits, model(IDS % model.config.vocab_size).logits) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), None])
def test_adapters_of_a_multimodal_gemma_load_in_peft_and_its_own_here(targets, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "head_dim": 12,
             "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4,
                                       image_token_index=96, boi_token_index=94, eoi_token_index=95)  # fmt: skip
    base = tmp_path / "base"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(base)
    model, spec = mini_forge.load_model(base), LoraSpec(3, 6, targets=targets)
    inject(model, spec)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.3)
    save_adapter(tmp_path / "run", model, spec, str(base))
    ids = IDS % 90
    peer = peft.PeftModel.from_pretrained(peer_model(base), tmp_path / "run")
    assert worst(model.logits(ids), peer(input_ids=ids).logits) < TOLERANCE
    assert not any("vision" in name for name, _ in peer.named_parameters() if "lora_" in name)
    pattern = r".*language_model.*\.(q_proj|up_proj)"
    peer = peft.get_peft_model(peer_model(base), peft.LoraConfig(r=3, target_modules=pattern, task_type="CAUSAL_LM"))
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    peer.save_pretrained(tmp_path / "theirs")
    ours = mini_forge.load_model(tmp_path / "theirs")
    assert worst(ours.logits(ids), peer.eval()(input_ids=ids).logits) < TOLERANCE
