"""Families: each rule of their config.json by hand, how experts lie on disk, and what the decoder promises of all."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mini_forge
from mini_forge.errors import CheckpointError
from mini_forge.io.weights import load_base
from mini_forge.model.decoder import KVCache
from mini_forge.model.families import FAMILIES, decoder_spec, expert_layout
from mini_forge.model.families.layout import (
    PACKED,
    InterleavedStacks,
    PerExpert,
    Place,
    TransposedStacks,
    text_name,
)
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.model.quant import dequantize_4bit, quantize_4bit, quantize_8bit
from mini_forge.model.rope import inverse_frequencies
from mini_forge.model.spec import LayerSpec
from tests import golden_files as golden
from tests.tiny import CONFIG

MODEL = Path(mini_forge.__file__).parent / "model"
SHARED = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
EXPERTS = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128, "head_dim": 64},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
MOE_CHECKPOINTS = [name for name in golden.FAMILIES if name.startswith(tuple(EXPERTS) + ("llama4",))]


def spec(kind, **changes):
    config = {"model_type": kind, **SHARED, **EXPERTS.get(kind, {}), **changes}
    return decoder_spec({key: value for key, value in config.items() if value is not ABSENT})


ABSENT = object()


def layers(kind, what, **changes):
    return [getattr(layer, what) for layer in spec(kind, **changes).layers]


def test_an_unknown_model_type_lists_the_supported_ones():
    with pytest.raises(CheckpointError) as error:
        decoder_spec({**SHARED, "model_type": "mamba"})
    assert str(error.value) == (
        "config.json: model_type 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3, qwen3_moe, "
        "gpt_oss, llama4, llama4_text, mixtral, gemma3, gemma3_text, phi3, smollm3, granite"
    )


DIFFERENT = "rope_parameters and rope_scaling mean different rotations; keep one"


def test_two_records_of_a_rope_must_mean_the_same():
    """Of transformers 4 rope_parameters are no concern, and 5 would take rope_scaling."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    new = {**yarn, "rope_theta": 5e5}
    alone = spec("llama", rope_parameters=new).rope
    for old in ({**yarn, "type": "yarn"}, {**yarn, "beta_fast": 32.0}, {**new, "rope_type": None, "type": "yarn"}):
        assert spec("llama", rope_parameters=new, rope_scaling=old, rope_theta=5e5).rope == alone
    plain = {"rope_type": "default", "rope_theta": 5e5}
    for parameters, beside in (
        (plain, {"rope_theta": 5e5}), (new, {}), ({**new, "attention_factor": 2.0}, {"rope_theta": 5e5}),
        ({**new, "partial_rotary_factor": 0.5}, {"rope_theta": 5e5}), ({**new, "beta_slow": 2}, {"rope_theta": 5e5}),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=DIFFERENT):
            spec("llama", rope_parameters=parameters, rope_scaling=yarn, **beside)
    kinds = {"full_attention": plain, "sliding_attention": plain}
    assert spec("gemma3_text", rope_parameters=kinds, rope_scaling=kinds) == spec("gemma3_text", rope_parameters=kinds)
    with pytest.raises(CheckpointError, match=DIFFERENT):
        spec("gemma3_text", rope_parameters=kinds, rope_scaling=yarn)
    with pytest.raises(CheckpointError, match=DIFFERENT):
        spec("gemma3_text", rope_parameters=kinds, rope_scaling={**kinds, "sliding_attention": {"rope_theta": 7.0}})
    linear = {"rope_type": "linear", "factor": 8.0}
    both = {"full_attention": {**linear, "rope_theta": 5e5}, "sliding_attention": plain}
    assert spec("gemma3_text", rope_parameters=both, rope_scaling=linear, rope_theta=5e5).rope.theta == 5e5
    with pytest.raises(CheckpointError, match="by kind of layer"):
        spec("llama", rope_parameters=kinds, rope_scaling=yarn)
    sections = {"rope_type": "default", "mrope_section": [1, 2]}  # a list in a record is no fault
    assert spec("llama", rope_scaling=sections).rope.kind == "default"


@pytest.mark.parametrize("kind, key", [
    ("qwen3_moe", "num_experts"), ("qwen3_moe", "moe_intermediate_size"), ("gpt_oss", "sliding_window"),
    ("gpt_oss", "num_local_experts"), ("llama4_text", "num_experts_per_tok"), ("mixtral", "num_local_experts"),
])  # fmt: skip
def test_a_missing_key_is_named(kind, key):
    with pytest.raises(CheckpointError, match=f"model_type '{kind}' needs the key '(num_local|{key})"):
        spec(kind, **{key: ABSENT})


# --- qwen3_moe


def test_qwen3_moe_takes_the_hubs_and_transformers_name_for_the_number_of_experts():
    assert spec("qwen3_moe").experts.count == 8
    assert spec("qwen3_moe", num_experts=ABSENT, num_local_experts=6).experts.count == 6


@pytest.mark.parametrize("changes, expected", [
    ({}, [True] * 4),
    ({"mlp_only_layers": None}, [True] * 4),
    ({"decoder_sparse_step": 2}, [False, True, False, True]),
    ({"decoder_sparse_step": 3}, [False, False, True, False]),
    ({"mlp_only_layers": [0, 3]}, [False, True, True, False]),
    ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [False, False, False, True]),
])  # fmt: skip
def test_qwen3_moe_layers_with_experts(changes, expected):
    assert layers("qwen3_moe", "experts", **changes) == expected


def test_qwen3_moe_normalises_only_where_it_says_so():
    assert not spec("qwen3_moe").experts.normalized
    assert spec("qwen3_moe", norm_topk_prob=True).experts.normalized


def test_qwen3_moe_slides_in_all_layers_or_none():
    options = {"sliding_window": 6, "max_window_layers": 2}
    assert layers("qwen3_moe", "window", **options) == [None] * 4
    assert layers("qwen3_moe", "window", use_sliding_window=True, **options) == [6] * 4


def test_mistral_slides_everywhere_unless_layer_types_say_where():
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert layers("mistral", "window", sliding_window=7) == [7] * 4
    assert layers("mistral", "window", sliding_window=None) == [None] * 4
    assert layers("mistral", "window", sliding_window=7, layer_types=kinds) == [None, 7, None, None]


@pytest.mark.parametrize("kind, theta, eps", [
    ("llama", 1e4, 1e-6), ("mixtral", 1e6, 1e-5), ("llama4_text", 5e5, 1e-5), ("gpt_oss", 1.5e5, 1e-5),
    ("phi3", 1e4, 1e-5), ("mistral", 1e4, 1e-6), ("smollm3", 2e6, 1e-6), ("gemma3_text", 1e6, 1e-6),
])  # fmt: skip
def test_keys_left_out_have_the_families_values(kind, theta, eps):
    """As transformers' configuration classes have them."""
    assert (spec(kind).rope.theta, spec(kind).norm_eps) == (theta, eps)
    given = spec(kind, rope_theta=77.0, rms_norm_eps=0.5)
    assert (given.rope.theta, given.norm_eps) == (77.0, 0.5)


def test_other_keys_left_out():
    assert layers("mistral", "window") == [4096] * 4
    assert spec("gpt_oss").rope.kind == "yarn" and spec("gpt_oss").rope.get("factor") == 32.0
    assert spec("gpt_oss", rope_scaling={"rope_type": "linear", "factor": 2.0}).rope.kind == "linear"
    windows = layers("qwen2", "window", use_sliding_window=True, sliding_window=7, num_hidden_layers=30)
    assert windows == [None] * 28 + [7] * 2


def test_the_trained_length_beside_the_record_has_priority():
    def trained(kind, record, **beside):
        return spec("llama", rope_scaling={"rope_type": kind, "factor": 2.0, **bands, **record}, **beside).rope.get(key)

    key, bands = "original_max_position_embeddings", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for kind in ("yarn", "llama3"):
        assert trained(kind, {key: 64}) == 64
        assert trained(kind, {key: 64}, **{key: 32}) == 32
        assert trained(kind, {}, **{key: 32}) == 32
        assert trained(kind, {}, max_position_embeddings=128) == 128


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(("record", "told"), [
    ({"rope_type": "linear", "factor": "4"}, "factor '4' must be a finite number above 0"),
    ({"rope_type": "linear", "factor": 0}, "factor 0 must be a finite number above 0"),
    ({"rope_type": "linear", "factor": math.inf}, "factor inf must be a finite number above 0"),
    ({"rope_type": "linear", "factor": True}, "factor True must be a finite number above 0"),
    ({**YARN, "beta_fast": 0}, "beta_fast 0 must be a finite number above 0"),
    ({**YARN, "attention_factor": "1"}, "attention_factor '1' must be a finite number above 0"),
    ({**YARN, "mscale": -1}, "mscale -1 must be a finite number above 0"),
    ({**YARN, "rope_theta": 1.0}, "rope_theta 1 turns all channels alike"),
    ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor 0 must be a finite number above 0"),
    ({"rope_theta": "1e4"}, "rope_theta '1e4' must be a finite number above 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for this model_type"),
])  # fmt: skip
def test_numbers_with_which_nothing_turns_are_named(record, told):
    with pytest.raises(CheckpointError, match=re.escape(told)):
        spec("llama", rope_parameters=record)


@pytest.mark.parametrize("record", [
    {**YARN, "mscale": 0, "mscale_all_dim": 0.0}, {"rope_type": "default", "factor": 0}, {**LLAMA3, "beta_fast": "x"},
])  # fmt: skip
def test_numbers_that_nothing_reads_are_left_alone(record):
    assert spec("llama", rope_parameters=record).rope.kind == record["rope_type"]


@pytest.mark.parametrize("part", [1.5, -1, "1", 0])
def test_a_part_of_a_head_is_a_share(part):
    with pytest.raises(CheckpointError, match=re.escape(f"partial_rotary_factor {part!r} must be")):
        spec("phi3", partial_rotary_factor=part)


def test_bands_of_yarn_that_run_backwards_and_a_null_are_as_transformers_has_them():
    """Its ramp divides by high - low, and by 0.001 only where they are equal; a null `truncate` is false."""
    made = spec("llama", rope_parameters={**YARN, "original_max_position_embeddings": 2, "truncate": None}).rope
    assert made.get("truncate", True) is None
    found, _ = inverse_frequencies(made, 16)
    base = 1.0 / 1e4 ** (torch.arange(0, 16, 2).float() / 16)
    low, high = (16 * math.log(2 / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (32, 1))
    low, high = max(low, 0), min(high, 15)
    assert high < low
    keep = 1 - ((torch.arange(8).float() - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(found, base / 4 * (1 - keep) + base * keep)


# --- gpt_oss


@pytest.mark.parametrize("null", ["rope_parameters", "rope_scaling"])
def test_gpt_oss_with_a_null_for_its_rotations_has_the_usual_ones(null):
    assert spec("gpt_oss", **{null: None}).rope == spec("gpt_oss").rope


@pytest.mark.parametrize("floor", [0, -1, "8"])
def test_llama4s_temperature_grows_by_steps_of_some_length(floor):
    with pytest.raises(CheckpointError, match="floor_scale .* must be a finite number above 0"):
        spec("llama4_text", floor_scale=floor)


def test_gpt_oss_slides_in_every_other_layer_beginning_with_the_first():
    assert layers("gpt_oss", "window") == [128, None, 128, None]
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert layers("gpt_oss", "window", layer_types=kinds) == [None, None, 128, None]


def test_gpt_oss_constants():
    made = spec("gpt_oss")
    assert (made.activation, made.clamp, made.sinks, made.norm_product) == ("clamped", (7.0, 1.702), True, "float32")
    assert (made.qkv_bias, made.out_bias, made.experts.bias, made.experts.router_bias) == (True,) * 4
    assert spec("gpt_oss", swiglu_limit=1.0, swiglu_alpha=1.2).clamp == (1.0, 1.2)


def test_gpt_oss_yarn_ramp_is_not_cut_to_whole_channels():
    """As its hub config has it: factor 32 over 4096 tokens, cos and sin times 0.1·ln 32 + 1."""
    scaling = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
               "original_max_position_embeddings": 4096}  # fmt: skip
    frequencies, magnitude = inverse_frequencies(
        spec("gpt_oss", rope_theta=150000.0, rope_scaling=scaling, head_dim=64).rope, 64
    )
    assert magnitude == pytest.approx(1.3465735902799727)
    # By hand, in float64: low 8.0928, high 17.3980; channel 9 is blended by (9 - 8.0928)/(17.3980 - 8.0928).
    assert float(frequencies[9]) == pytest.approx(0.0317056962, rel=1e-6)
    assert float(frequencies[8]) == pytest.approx(150000 ** (-16 / 64), rel=1e-6)
    assert float(frequencies[18]) == pytest.approx(150000 ** (-36 / 64) / 32, rel=1e-6)


# --- llama4


@pytest.mark.parametrize("changes, has_rope", [
    ({}, [1, 1, 1, 0]),
    ({"no_rope_layers": []}, [1, 1, 1, 0]),
    ({"no_rope_layers": None}, [1, 1, 1, 0]),
    ({"no_rope_layers": None, "no_rope_layer_interval": 2}, [1, 0, 1, 0]),
    ({"no_rope_layers": [0, 1, 1, 0]}, [0, 1, 1, 0]),
])  # fmt: skip
def test_llama4_layers_without_rope_are_whole_and_warmed(changes, has_rope):
    found = spec("llama4_text", attention_chunk_size=8, **changes).layers
    assert [layer.rope for layer in found] == ["global" if turns else None for turns in has_rope]
    assert [layer.chunk for layer in found] == [8 if turns else None for turns in has_rope]
    assert [layer.temperature for layer in found] == [not turns for turns in has_rope]


def test_llama4_layer_types_decide_on_chunks_alone():
    kinds = ["full_attention", "chunked_attention", "chunked_attention", "full_attention"]
    found = spec("llama4_text", layer_types=kinds).layers
    assert [layer.chunk for layer in found] == [None, 8192, 8192, None]
    assert [layer.rope for layer in found] == ["global", "global", "global", None]


@pytest.mark.parametrize("changes, expected", [
    ({}, [True] * 4),
    ({"interleave_moe_layer_step": 2}, [False, True, False, True]),
    ({"interleave_moe_layer_step": 2, "moe_layers": None}, [False, True, False, True]),
    ({"interleave_moe_layer_step": 2, "moe_layers": [0, 3]}, [True, False, False, True]),
    ({"moe_layers": []}, [False] * 4),
])  # fmt: skip
def test_llama4_layers_with_experts(changes, expected):
    assert layers("llama4_text", "experts", **changes) == expected


def test_llama4_temperature_and_norms_follow_their_switches():
    made = spec("llama4_text")
    assert (made.temperature, made.qk_norm, made.rope_interleaved) == ((0.1, 8192), "weightless", True)
    # Old configs switch it with the number 4.
    assert layers("llama4_text", "temperature", attn_temperature_tuning=4) == [False, False, False, True]
    assert layers("llama4_text", "temperature", attn_temperature_tuning=False) == [False] * 4
    assert spec("llama4_text", use_qk_norm=False).qk_norm is None
    assert spec("llama4_text", attn_scale=0.5, floor_scale=4).temperature == (0.5, 4)


def test_llama4_dense_layers_have_a_width_of_their_own():
    made = spec("llama4_text", intermediate_size_mlp=96)
    assert (made.mlp_size, made.experts.size, made.experts.shared_size) == (96, 48, 48)


def test_llama4_reads_the_text_part_of_a_multimodal_config():
    text = {**SHARED, **EXPERTS["llama4_text"], "num_hidden_layers": 2}
    assert decoder_spec({"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 7}}) == (
        decoder_spec({"model_type": "llama4_text", **text})
    )


# --- smollm3, gemma3, phi3, granite, mixtral


@pytest.mark.parametrize("changes, has_rope", [
    ({}, [1, 1, 1, 0]),
    ({"no_rope_layers": None, "no_rope_layer_interval": 2}, [1, 0, 1, 0]),
    ({"no_rope_layers": [0, 1, 0, 1]}, [0, 1, 0, 1]),
])  # fmt: skip
def test_smollm3_layers_without_rope_slide_where_there_is_a_window(changes, has_rope):
    assert layers("smollm3", "rope", **changes) == ["global" if turns else None for turns in has_rope]
    assert layers("smollm3", "window", **changes) == [None] * 4
    sliding = layers("smollm3", "window", use_sliding_window=True, sliding_window=6, **changes)
    assert sliding == [None if turns else 6 for turns in has_rope]


def test_smollm3_defaults():
    made = spec("smollm3")
    assert made.tied_head and made.rope.theta == 2e6
    assert not spec("smollm3", tie_word_embeddings=False).tied_head


def test_gemma3_pattern_and_windows():
    assert layers("gemma3_text", "rope", num_hidden_layers=7) == ["local"] * 5 + ["global", "local"]
    assert layers("gemma3_text", "window", num_hidden_layers=7, sliding_window=9) == [9] * 5 + [None, 9]
    assert layers("gemma3_text", "rope", sliding_window_pattern=2) == ["local", "global"] * 2
    kinds = ["full_attention", "sliding_attention"] * 2
    assert layers("gemma3_text", "rope", layer_types=kinds) == ["global", "local"] * 2


def test_gemma3_has_two_rotations_in_either_form():
    """Only the global one is scaled."""
    linear = {"rope_type": "linear", "factor": 8.0}
    old = spec("gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear)
    parameters = {"full_attention": {"rope_theta": 1e6, **linear},
                  "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    new = spec("gemma3_text", rope_parameters=parameters)
    assert (old.rope, old.local_rope) == (new.rope, new.local_rope)
    assert (old.rope.theta, old.rope.kind, old.local_rope.theta, old.local_rope.kind) == (1e6, "linear", 1e4, "default")
    assert (spec("gemma3_text").rope.theta, spec("gemma3_text").local_rope.theta) == (1e6, 1e4)


def test_gemma3_constants():
    made = spec("gemma3_text", query_pre_attn_scalar=24)
    assert made.attention_scale == pytest.approx(24**-0.5) and made.embed_scale == pytest.approx(32**0.5)
    assert (made.norm_offset, made.norm_product, made.post_norms, made.tied_head) == (1.0, "float32", True, True)
    assert made.activation == "gelu_tanh"


@pytest.mark.parametrize("key, value", [("final_logit_softcapping", 30.0), ("use_bidirectional_attention", True)])
def test_gemma3_refuses_what_the_decoder_lacks(key, value):
    with pytest.raises(CheckpointError, match=f"config.json: {key} {value!r} is not supported; supported: "):
        spec("gemma3_text", **{key: value})
    assert spec("gemma3_text", **{key: None})


@pytest.mark.parametrize("scaling", [
    {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, {"type": "su", "long_factor": [2.0]},
    {"type": "linear", "factor": 2.0},
    # transformers reads this one as longrope.
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
])  # fmt: skip
def test_phi3_refuses_scaled_rotations(scaling):
    with pytest.raises(CheckpointError, match=f"rope type '{scaling['type']}' is not supported"):
        spec("phi3", rope_scaling=scaling)


def test_phi3_fuses_and_turns_a_part():
    made = spec("phi3", partial_rotary_factor=0.75, sliding_window=7)
    assert made.fused_projections and made.rope.get("partial_rotary_factor") == 0.75
    assert [layer.window for layer in made.layers] == [7] * 4
    inner = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}
    assert spec("phi3", rope_parameters=inner).rope.get("partial_rotary_factor") == 0.5


def test_granite_multipliers():
    made = spec("granite", embedding_multiplier=3.0, attention_multiplier=0.15, residual_multiplier=0.4,
                logits_scaling=8.0)  # fmt: skip
    assert (made.embed_scale, made.attention_scale, made.residual_scale, made.hidden_scale) == (3.0, 0.15, 0.4, 0.125)
    plain = spec("granite")
    assert (plain.embed_scale, plain.attention_scale, plain.residual_scale, plain.hidden_scale) == (1.0,) * 4


def test_mixtral_always_normalises_and_slides_where_it_says_so():
    made = spec("mixtral")
    assert made.experts.normalized and made.layers == (LayerSpec(experts=True),) * 4
    assert layers("mixtral", "window", sliding_window=7) == [7] * 4


# --- how experts lie on disk


@pytest.mark.parametrize("leaf, rows, columns", [("gate_up_proj", 6, 4), ("down_proj", 4, 3)])
@pytest.mark.parametrize("layout", [TransposedStacks(), InterleavedStacks(), PerExpert(("a", "b", "c"))])
def test_a_layouts_two_directions_are_inverse_bit_for_bit(layout, leaf, rows, columns):
    x = torch.randn(rows, columns)
    for part in (None, *PACKED):
        place = Place(f"model.layers.0.mlp.experts.{leaf}", None, part)
        assert torch.equal(layout.stored(place, layout.canonical(place, x)), x)
        assert torch.equal(layout.canonical(place, layout.stored(place, x)), x)
    bias = Place(f"model.layers.0.mlp.experts.{leaf}_bias")
    if isinstance(layout, InterleavedStacks):
        assert torch.equal(layout.stored(bias, layout.canonical(bias, x[:, 0])), x[:, 0])


def test_canonical_rows_by_hand():
    """Stored (in, out) = (1, 4): gate rows 1, 2 and up rows 10, 20."""
    place = Place("m.experts.gate_up_proj")
    halves, turns = torch.tensor([[1.0, 2, 10, 20]]), torch.tensor([[1.0, 10, 2, 20]])
    assert TransposedStacks().canonical(place, halves).flatten().tolist() == [1, 2, 10, 20]
    assert InterleavedStacks().canonical(place, turns).flatten().tolist() == [1, 2, 10, 20]
    assert InterleavedStacks().canonical(Place(place.name + "_bias"), turns[0]).tolist() == [1, 2, 10, 20]
    packed = Place(place.name, None, "_scales")  # rows are out already
    assert InterleavedStacks().canonical(packed, turns.T).flatten().tolist() == [1, 2, 10, 20]
    down = Place("m.experts.down_proj")
    assert InterleavedStacks().canonical(down, turns).flatten().tolist() == [1, 10, 2, 20]


@pytest.mark.parametrize("kind, stored, expected", [
    ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight",
     Place("model.layers.0.mlp.experts.gate_up_proj", 3, "up")),
    ("qwen3_moe", "model.layers.0.mlp.experts.12.down_proj.weight", Place("model.layers.0.mlp.experts.down_proj", 12)),
    ("qwen3_moe", "model.layers.0.mlp.up_proj.weight", None),
    ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj", Place("model.layers.0.mlp.experts.gate_up_proj")),
    ("mixtral", "model.layers.0.mlp.experts.3.w1.weight", Place("model.layers.0.mlp.experts.gate_up_proj", 3, "gate")),
    ("mixtral", "model.layers.0.mlp.experts.3.w3.weight", Place("model.layers.0.mlp.experts.gate_up_proj", 3, "up")),
    ("mixtral", "model.layers.0.mlp.experts.3.w2.weight", Place("model.layers.0.mlp.experts.down_proj", 3)),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_blocks",
     Place("model.layers.0.mlp.experts.gate_up_proj", None, "_blocks")),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", Place("model.layers.0.mlp.experts.down_proj_bias")),
    ("gpt_oss", "model.layers.0.mlp.router.bias", None),
    ("llama4_text", "model.layers.0.feed_forward.experts.down_proj",
     Place("model.layers.0.feed_forward.experts.down_proj")),
    ("llama4_text", "model.layers.0.feed_forward.shared_expert.down_proj.weight", None),
])  # fmt: skip
def test_places(kind, stored, expected):
    assert expert_layout({"model_type": kind}).place(stored) == expected


def test_families_without_experts_have_no_layout():
    with_layout = {kind for kind in FAMILIES if expert_layout({"model_type": kind}) is not None}
    assert with_layout == {"qwen3_moe", "gpt_oss", "llama4", "llama4_text", "mixtral"}


@pytest.mark.parametrize("stored, expected", [
    ("language_model.model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
    ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("vision_model.class_embedding", None),
    ("model.vision_tower.patch.weight", None),
    ("multi_modal_projector.linear_1.weight", None),
    ("model.multi_modal_projector.linear_1.weight", None),
])  # fmt: skip
def test_names_of_the_text_model(stored, expected):
    assert text_name(stored) == expected


def test_mixtrals_names_become_those_of_adapters():
    layout = expert_layout({"model_type": "mixtral"})
    assert text_name("model.layers.0.block_sparse_moe.gate.weight", layout) == "model.layers.0.mlp.gate.weight"


def changed(name, folder, change):
    """A copy of a golden checkpoint whose tensors `change` has edited."""
    out = shutil.copytree(golden.family(name)[0], folder / name)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    return out


def in_8_bits(tensors, name):
    """As bitsandbytes stores a linear layer."""
    packed, scale = quantize_8bit(tensors[f"{name}.weight"].float())
    return {f"{name}.weight": packed, f"{name}.SCB": scale}


QWEN, GPT, LLAMA4 = (f"model.layers.1.{mlp}.experts" for mlp in ("mlp", "mlp", "feed_forward"))
UNSOUND = {
    "qwen: one expert's matrix absent": (
        "qwen3_moe_hub", lambda t: t.pop(f"{QWEN}.5.up_proj.weight"), r"missing.*layers.1.mlp.experts.gate_up_proj"),
    "qwen: a whole stack absent": (
        "qwen3_moe_hub", lambda t: [t.pop(f"{QWEN}.{e}.down_proj.weight") for e in range(8)],
        r"1 tensors are missing.*layers.1.mlp.experts.down_proj"),
    "qwen: an expert too many": (
        "qwen3_moe_hub", lambda t: t.update({f"{QWEN}.8.up_proj.weight": t[f"{QWEN}.0.up_proj.weight"].clone()}),
        r"expert 8.*config.json has 8"),
    "qwen: a transposed matrix": (
        "qwen3_moe_hub", lambda t: t.update({f"{QWEN}.2.down_proj.weight": t[f"{QWEN}.2.down_proj.weight"].T}),
        r"experts.down_proj of expert 2: stored as \[8, 32\], config.json asks for \[32, 8\]"),
    "qwen: in 8 bits, a matrix and its scales apart": (
        "qwen3_moe_hub", lambda t: t.update(in_8_bits(t, f"{QWEN}.2.down_proj")),
        r"experts.2.down_proj.weight: stored as torch.int8 in a form that is not known"),
    "qwen: experts in a dense layer": (
        "qwen3_moe_step", lambda t: t.update({"model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(16, 32)}),
        r"unexpected tensor 'model.layers.1.mlp.experts.0.up_proj.weight'"),
    "gpt-oss: an expert too few": (
        "gpt_oss_hub", lambda t: t.update({f"{GPT}.gate_up_proj": t[f"{GPT}.gate_up_proj"][:3]}), r"\[3, 32, 32\]"),
    "gpt-oss: an expert too many": (
        "gpt_oss_hub", lambda t: t.update({f"{GPT}.down_proj": t[f"{GPT}.down_proj"].repeat(2, 1, 1)}),
        r"\[8, 16, 32\]"),
    "gpt-oss: not a stack": (
        "gpt_oss_hub", lambda t: t.update({f"{GPT}.down_proj": t[f"{GPT}.down_proj"][0]}), r"down_proj.*\[16, 32\]"),
    "gpt-oss: another width": (
        "gpt_oss_hub", lambda t: t.update({f"{GPT}.gate_up_proj": t[f"{GPT}.gate_up_proj"][:, :, :30]}),
        r"experts.gate_up_proj.*stored as \[30, 32\].*asks for \[32, 32\]"),
    "gpt-oss: a short bias": (
        "gpt_oss_hub", lambda t: t.update({f"{GPT}.down_proj_bias": t[f"{GPT}.down_proj_bias"][:, :5]}),
        r"experts.down_proj_bias.*\[4, 5\].*\[4, 32\]"),
    "gpt-oss: no bias": ("gpt_oss_hub", lambda t: t.pop(f"{GPT}.gate_up_proj_bias"), r"missing.*gate_up_proj_bias"),
    "gpt-oss: a bias of one dimension": (
        "gpt_oss_hub", lambda t: t.update({f"{GPT}.down_proj_bias": t[f"{GPT}.down_proj_bias"][0]}),
        r"experts.down_proj_bias.*\[32\]"),
    "mxfp4: no scales": (
        "gpt_oss_mxfp4", lambda t: t.pop(f"{GPT}.down_proj_scales"), r"missing.*experts.down_proj"),
    "mxfp4: scales of an expert too few": (
        "gpt_oss_mxfp4", lambda t: t.update({f"{GPT}.down_proj_scales": t[f"{GPT}.down_proj_scales"][:3]}),
        r"experts.down_proj_scales.*\[3, 32, 2\].*\[4, 32, 2\]"),
    "mxfp4: blocks of another form": (
        "gpt_oss_mxfp4", lambda t: t.update({f"{GPT}.down_proj_blocks": t[f"{GPT}.down_proj_blocks"].flatten(2)}),
        r"experts.down_proj_blocks.*\[4, 32, 32\].*\[4, 32, 2, 16\]"),
    "mxfp4: scales that are not bytes": (
        "gpt_oss_mxfp4", lambda t: t.update({f"{GPT}.down_proj_scales": t[f"{GPT}.down_proj_scales"].float()}),
        r"down_proj_scales: stored as torch.float32 in a form that is not known"),
    "mxfp4: a scale that is not a number": (
        "gpt_oss_mxfp4", lambda t: t[f"{GPT}.gate_up_proj_scales"][2, 5].fill_(255), r"255.*NaN"),
    "llama4: not transposed": (
        "llama4_text_hub", lambda t: t.update({f"{LLAMA4}.down_proj": t[f"{LLAMA4}.down_proj"].transpose(1, 2)}),
        r"experts.down_proj.*stored as \[8, 32\].*asks for \[32, 8\]"),
    "llama4: a stack absent": (
        "llama4_text_hub", lambda t: t.pop(f"{LLAMA4}.gate_up_proj"), r"missing.*feed_forward.experts.gate_up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSOUND)
def test_stacks_that_do_not_fit_are_named(case, tmp_path):
    name, change, message = UNSOUND[case]
    with pytest.raises(CheckpointError, match=message) as error:
        mini_forge.load_model(changed(name, tmp_path, change))
    assert "\n" not in str(error.value)
    if "not a number" not in case:  # a value, which no header tells
        with pytest.raises(CheckpointError) as beforehand:
            load_base(tmp_path / name, headers_only=True)
        assert str(beforehand.value) == str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", MOE_CHECKPOINTS)
def test_experts_are_quantized_each_as_its_matrix_alone(name, quantization):
    """MXFP4 stays as it is stored."""
    folder = golden.family(name)[0]
    dense = dict(mini_forge.load_model(folder).named_parameters())
    model = mini_forge.load_model(folder, quantization=quantization)
    stacks = {n: m for n, m in model.named_modules() if n.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    assert stacks
    for n, stack in stacks.items():
        if name == "gpt_oss_mxfp4":
            assert type(stack).__name__ == "StackMxfp4"
            continue
        for e in range(stack.count):
            weight, found = dense[n][e], stack.expert(e, torch.float32)
            if quantization == "int8":  # rows to 255 steps of their largest magnitude
                bound = weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.01
                assert ((found - weight).abs() <= bound).all()
            else:
                assert torch.equal(found, dequantize_4bit(quantize_4bit(weight, "nf4", False), torch.float32))


# --- what the decoder promises, for every golden checkpoint


@pytest.fixture(scope="module", params=golden.FAMILIES)
def model(request):
    return mini_forge.load_model(golden.family(request.param)[0])


def random_ids(model, *shape, seed=0):
    return torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_cached_steps_equal_one_pass_for_rows_of_unequal_length(model):
    """Prompts of 13 and 9, then token by token past every window and chunk of the golden checkpoints."""
    prompt, steps, T = torch.tensor([13, 9]), 11, 24
    ids = random_ids(model, 2, T)
    full = model.logits(ids)
    cache, position = KVCache(model, 2, T), torch.arange(13).expand(2, 13)
    first = model.head(model(ids[:, :13], position=position, cache=cache))  # row 1's last four are pads
    for row in range(2):
        torch.testing.assert_close(first[row, : prompt[row]], full[row, : prompt[row]], rtol=1e-4, atol=1e-4)
    for step in range(steps):
        at = (prompt + step)[:, None]
        new = model.head(model(ids.gather(1, at), position=at, cache=cache))
        torch.testing.assert_close(new, full[torch.arange(2)[:, None], at], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changing_a_document_leaves_the_others(model):
    """Bit for bit; with experts to 1e-6 of the spread: other tokens share an expert's product with the changed ones, so
    its rows move to other places of the matrix, where a product may sum in another order."""
    ids, document = random_ids(model, 1, 30), torch.tensor([[0] * 13 + [1] * 17])
    other = ids.clone()
    other[0, :13] = (other[0, :13] + 1) % model.spec.vocab_size
    a, b = model.logits(ids, document=document), model.logits(other, document=document)
    if model.spec.experts is None:
        assert torch.equal(a[:, 13:], b[:, 13:])
    assert float((a[:, 13:] - b[:, 13:]).abs().max() / a.std()) < 1e-6
    assert not torch.allclose(a[:, :13], b[:, :13])


@pytest.mark.parametrize("name", MOE_CHECKPOINTS)
def test_packed_and_unpacked_gradients_agree(name):
    model = mini_forge.load_model(golden.family(name)[0])
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")
    inject(model, LoraSpec(2, 4, targets=targets), torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    parts = [random_ids(model, 1, n, seed=n) for n in (19, 4, 11)]
    weights = [torch.randn(1, p.shape[1], 32, generator=torch.Generator().manual_seed(5)) for p in parts]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    document = torch.cat([torch.full((p.shape[1],), i) for i, p in enumerate(parts)])[None]
    packed = gradients((model(torch.cat(parts, 1), document=document) * torch.cat(weights, 1)).sum())
    alone = gradients(sum((model(p) * w).sum() for p, w in zip(parts, weights, strict=True)))
    assert packed.keys() == alone.keys() and any(".experts." in n for n in packed)
    for n, gradient in packed.items():
        scale = float(alone[n].abs().max())
        assert float((gradient - alone[n]).abs().max()) < 1e-5 * scale, n


def test_every_file_of_a_family_is_short():
    for file in (MODEL / "families").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 120, file


@pytest.mark.parametrize("module", ["decoder", "experts", "grouped", "spec", "lora", "masks", "cache"])
def test_what_computes_names_no_family(module):
    text = (MODEL / f"{module}.py").read_text(encoding="utf-8").lower()
    for name in ("llama", "mistral", "qwen", "gpt", "gemma", "phi3", "phi-3", "mixtral", "smollm", "granite"):
        assert name not in text, name


def test_golden_configs_cover_both_forms_of_every_family():
    """Each family twice at least, once as the hub has it."""
    kinds = {}
    for name in golden.FAMILIES:
        config = json.loads((golden.family(name)[0] / "config.json").read_text())
        kinds.setdefault(config["model_type"].removesuffix("_text"), set()).add("torch_dtype" in config)
    assert all(forms == {True, False} for forms in kinds.values()), kinds
    assert kinds.keys() == {kind.removesuffix("_text") for kind in FAMILIES}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": []}, "model_type"),
        ({"model_type": "llama4_text", "no_rope_layers": [1]}, "wrong kind"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "num_hidden_layers 4 but 1 layers"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters by kind of layer"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_a_config_whose_numbers_cannot_be_a_models_is_refused(changes, message):
    config = {**CONFIG, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1, **changes}
    with pytest.raises(CheckpointError, match=message):
        decoder_spec(config)


@pytest.mark.parametrize("key, value, rule", [
    ("hidden_size", "64", "whole number"), ("hidden_size", None, "whole number"), ("hidden_size", -8, "whole number"),
    ("hidden_size", 1.5, "whole number"), ("vocab_size", True, "whole number"), ("head_dim", "x", "whole number"),
    ("num_key_value_heads", 0, "whole number"), ("max_position_embeddings", None, "whole number"),
    ("max_position_embeddings", "x", "whole number"), ("rms_norm_eps", "x", "finite number above 0"),
    ("rms_norm_eps", None, "finite number above 0"), ("rms_norm_eps", math.inf, "finite number above 0"),
    ("rms_norm_eps", math.nan, "finite number above 0"), ("rope_theta", -1.0, "finite number above 0"),
    ("quantization_config", 5, "an object"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_a_number_of_the_wrong_kind_is_named(kind, key, value, rule):
    with pytest.raises(CheckpointError, match=f"^config.json: {key} {value!r} must be .*{rule}"):
        spec(kind, **{key: value})


@pytest.mark.parametrize("kind, changes, name", [
    ("mistral", {"sliding_window": "x"}, "sliding_window 'x'"),
    ("llama4_text", {"attention_chunk_size": 0}, "attention_chunk_size 0"),
    ("llama4_text", {"floor_scale": "x"}, "floor_scale"),
    ("mixtral", {"num_local_experts": 4.0}, "number of experts 4.0"),
    ("mixtral", {"num_experts_per_tok": True}, "num_experts_per_tok True"),
    ("qwen3_moe", {"moe_intermediate_size": -1}, "width of an expert -1"),
    ("granite", {"embedding_multiplier": "x"}, "embedding multiplier 'x'"),
])  # fmt: skip
def test_a_number_of_a_familys_own_is_named_too(kind, changes, name):
    with pytest.raises(CheckpointError, match=name):
        spec(kind, **changes)
