"""From configuration and machine to the plan: precision, storage, notes; and which profile a machine is."""

import pytest

from mini_forge.config import Machine, TrainingConfig, detect_machine, resolve
from mini_forge.config_plan import GIB, profile_of
from mini_forge.errors import ConfigError

CPU = Machine("cpu", False, 32 * GIB)
AMPERE = Machine("cuda", True, 64 * GIB, 24 * GIB)
TURING = Machine("cuda", False, 64 * GIB, 16 * GIB)


def make(**keys) -> TrainingConfig:
    first = {"task": "text-generation", "model_name": "m", "dataset": "d.jsonl", "compute_specs": "low_end"}
    return TrainingConfig.from_dict({**first, **keys})


@pytest.mark.parametrize(
    ("machine", "keys", "dtype", "scaler", "why"),
    [
        (AMPERE, {}, "bfloat16", False, "because this GPU computes it natively"),
        (TURING, {}, "float16", True, "because this GPU lacks native bfloat16"),
        (CPU, {}, "float32", False, "because the device is cpu"),
        (Machine("mps"), {}, "float32", False, "because the device is mps"),
        (CPU, {"bf16": True}, "bfloat16", False, "as bf16 asks"),
        (CPU, {"fp16": True}, "float16", True, "as fp16 asks"),
        (AMPERE, {"dtype": "float32"}, "float32", False, "as dtype asks"),
        (AMPERE, {"dtype": "float16"}, "float16", True, "as dtype asks"),
        (TURING, {"bf16": True}, "bfloat16", False, "only emulates"),
    ],
)
def test_precision_is_what_was_asked_for_else_what_the_device_does_well(machine, keys, dtype, scaler, why):
    plan = resolve(make(**keys), machine)
    assert (plan.device, plan.dtype, plan.use_scaler) == (machine.device, dtype, scaler)
    assert plan.notes[0].startswith(f"precision: {dtype}") and why in plan.notes[0]


@pytest.mark.parametrize(
    ("keys", "quantization", "nested"),
    [
        ({}, "nf4", False),
        ({"bnb_4bit_quant_type": "fp4", "use_nested_quant": True}, "fp4", True),
        ({"compute_specs": "mid_range"}, "nf4", True),
        ({"use_8bit": True, "use_nested_quant": True}, "int8", False),
        ({"compute_specs": "high_end"}, None, False),
    ],
)
def test_storage_follows_the_flags(keys, quantization, nested):
    plan = resolve(make(**keys), AMPERE)
    assert (plan.quantization, plan.nested) == (quantization, nested)


def test_4_bit_products_follow_the_training_dtype_unless_asked_otherwise():
    def compute(machine, **keys):
        plan = resolve(make(**keys), machine)
        return plan.compute_dtype, [n for n in plan.notes if n.startswith("bnb_4bit_compute_dtype")]

    assert compute(TURING) == ("float16", [])
    followed, notes = compute(CPU)
    assert followed == "float32" and "only what profile low_end suggests" in notes[0]
    asked, notes = compute(CPU, bnb_4bit_compute_dtype="bfloat16")
    assert asked == "bfloat16" and "warning" in notes[0]
    assert compute(CPU, use_4bit=False, bnb_4bit_compute_dtype="bfloat16") == ("float32", [])


def test_what_the_device_cannot_do_is_noted():
    paged = "paged_adamw_32bit: this device (cpu) has no paged memory, the states are plain"
    assert paged in resolve(make(), CPU).notes
    assert not any("paged" in note for note in resolve(make(), AMPERE).notes)
    assert not any("paged" in note for note in resolve(make(optim="sgd"), CPU).notes)
    assert any(note.startswith("group_by_length: no effect") for note in resolve(make(packing=True), CPU).notes)
    assert not any("group_by_length" in note for note in resolve(make(), CPU).notes)


def test_a_device_that_is_absent_is_an_error():
    with pytest.raises(ConfigError, match="device: 'cuda' is not available"):
        resolve(make(device="cuda"), CPU)
    assert resolve(make(device="cuda"), AMPERE).device == "cuda"


@pytest.mark.parametrize(
    ("vram", "memory", "profile"),
    [
        (None, 8, "low_end"), (None, 15.2, "mid_range"), (None, 512, "mid_range"),
        (7.1, 64, "low_end"), (7.2, 64, "mid_range"), (7.2, 8, "low_end"), (15.1, 64, "mid_range"),
        (15.2, 64, "high_end"), (80, 8, "mid_range"), (80, None, "mid_range"), (None, None, "low_end"),
    ],
)  # fmt: skip
def test_the_machine_s_profile_goes_by_gpu_and_host_memory(vram, memory, profile):
    size = [None if gib is None else int(gib * GIB) for gib in (vram, memory)]
    assert profile_of(Machine("cpu" if vram is None else "cuda", False, size[1], size[0])) == profile


def test_this_machine_is_detected():
    import torch

    machine = detect_machine("cpu")
    assert machine.device == "cpu" and machine.memory_bytes > GIB / 4 and machine.vram_bytes is None
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: 'cuda' is not available"):
            detect_machine("cuda")
