"""The code for CUDA, on a GPU that is not there (cuda_on_cpu.py): the same numbers as on the CPU, in Triton's kernels,
and no tensor where torch does not want it."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import mini_forge
from mini_forge_kernels.triton_support import IS_INSTALLED
from tests import tiny, tiny_experts

HERE = Path(__file__).parent
GPU_BUILD = torch.version.cuda or torch.version.hip
pytestmark = [
    pytest.mark.skipif(GPU_BUILD is not None, reason="this build of torch has a real CUDA device, or looks for one"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++"),
    pytest.mark.skipif(not IS_INSTALLED, reason="triton is not installed: pip install 'mini-forge[kernels]'"),
]
DENSE = {
    "nf4": {"use_4bit": True, "use_nested_quant": True},
    "dpo": {"strategy": "dpo", "dataset": "pairs.jsonl", "gradient_checkpointing": True, "recompute": "full",
            "precompute_reference": True},
    "kto": {"strategy": "dpo", "loss_type": "kto", "dataset": "labels.jsonl"},
    "rlhf": {
        "strategy": "rlhf", "dataset": "pairs.jsonl", "gradient_accumulation_steps": 1, "max_new_tokens": 3,
        "rollout_batch_size": 2, "num_mini_batches": 1, "ppo_epochs": 1, "max_steps": 2,
    },
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"]
EXPERTS = {
    "qwen3_moe": {"model_name": "qwen3_moe", "target_modules": TARGETS},
    "gpt_oss": {"model_name": "gpt_oss", "use_8bit": True},
    "llama4_text": {"model_name": "llama4_text", "target_modules": TARGETS, "use_4bit": True},
}
LOSSES = ("loss", "eval_loss", "eval_reward_mean")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = Path(torch.__file__).parent
    made = tmp_path_factory.mktemp("cuda") / "cuda_on_cpu.so"
    headers = [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}"]
    links = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = str(HERE / "cuda_on_cpu.cpp")
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *headers, source, *links, "-o", str(made)], check=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and rows, and the folder in which commands run. All is short: the interpreter takes its time."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_checkpoint(folder / "llama")
    tiny.write_checkpoint(folder / "mistral", model_type="mistral", sliding_window=3)
    for kind in tiny_experts.CONFIGS:
        tiny_experts.write_checkpoint(folder / kind, kind)
    for model in ("llama", "mistral", *tiny_experts.CONFIGS):
        tiny.tokenizer_files(folder / model, "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>")
    sums = [{"prompt": f"{i}+{i}", "chosen": f"={2 * i}", "rejected": "?" * (1 + i % 3)} for i in range(6)]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in sums]
    labels = [{**row, "label": bool(i % 2)} for i, row in enumerate(texts)]
    for name, rows in (("rows", texts), ("pairs", sums), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_config(folder, name, **changes):
    record = {
        "task": "text-generation", "model_name": "llama", "dataset": "rows.jsonl", "compute_specs": "low_end",
        "use_4bit": False, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "warmup_ratio": 0.0, "logging_steps": 1, "provider": "unsloth", "lora_r": 8,
        "lora_dropout": 0.0, "optim": "adamw_torch", "max_seq_length": 32,
        "gradient_checkpointing": False, "output_dir": f"runs/{name}", **changes,
    }  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record))
    return path


def losses(folder, name):
    lines = [json.loads(line) for line in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in LOSSES if key in line]


def on_cuda(library, folder, *commands):
    """Runs them there. Returns what they printed and the report of each."""
    paths = folder / "commands.json", folder / "reports.json"
    paths[0].write_text(json.dumps([list(map(str, command)) for command in commands]))
    done = subprocess.run([sys.executable, str(HERE / "cuda_on_cpu.py"), str(library), *map(str, paths)], cwd=folder,
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(paths[1].read_text())


def on_cpu(config):
    mini_forge.train(mini_forge.TrainingConfig.from_file(config), report=lambda line: None)


@pytest.mark.parametrize("cases", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_float32_trains_as_on_the_cpu(library, folder, cases, monkeypatch):
    monkeypatch.chdir(folder)
    for name, changes in cases.items():
        on_cpu(write_config(folder, f"{name} cpu", dtype="float32", device="cpu", **changes))
    configs = [write_config(folder, f"{name} cuda", dtype="float32", **changes) for name, changes in cases.items()]
    _, reports = on_cuda(library, folder, *(("train", config) for config in configs))
    for name, report in zip(cases, reports, strict=True):
        found = losses(folder, f"{name} cuda")
        assert len(found) >= 3 and found == pytest.approx(losses(folder, f"{name} cpu"), rel=2e-5), name
        assert {f"{file}._forward" for file in ("rms_norm", "swiglu")} <= report["launches"].keys()


def test_sixteen_bits_train(library, folder, monkeypatch):
    """In bfloat16 as on the CPU, but for what drawing or float16 changes. Attention is then one kernel of torch's."""
    monkeypatch.chdir(folder)
    same = {"llama": {"gradient_checkpointing": True, "recompute": "offload", "packing": True},
            "mistral": {"model_name": "mistral", "provider": "huggingface"}}  # fmt: skip
    for name, changes in same.items():
        cpu = {**changes, "recompute": "full"} if "recompute" in changes else changes
        on_cpu(write_config(folder, f"{name} bf16", bf16=True, device="cpu", **cpu))
    cases = {
        **same, "drop": {"lora_dropout": 0.1, "neftune_noise_alpha": 1.0},
        "fp16": {"fp16": True, "use_4bit": True, "optim": "paged_adamw_8bit"},
    }  # fmt: skip
    configs = [write_config(folder, f"{name} 16", **changes) for name, changes in cases.items()]
    out, _ = on_cuda(library, folder, *(("train", config) for config in configs))
    assert out.count("float16 with a gradient scaler") == 1 and out.count("bfloat16, because this GPU") == 3
    for name in cases:
        found = losses(folder, f"{name} 16")
        assert found[-1] < found[0] - 0.2, name
        assert name not in same or found == pytest.approx(losses(folder, f"{name} bf16"), rel=2e-3), name


def test_a_step_waits_for_the_device_when_it_ends(library, folder):
    """Twice, for its loss and for the norm of its gradients; within its two microbatches it does not."""
    settings = {"lora_dropout": 0.1, "neftune_noise_alpha": 1.0, "eval_split": 0, "save_strategy": "no"}
    configs = [write_config(folder, f"{steps} steps", max_steps=steps, **settings) for steps in (2, 5)]
    _, (few, more) = on_cuda(library, folder, *(("train", config) for config in configs))
    waits = Counter(more["waits"]) - Counter(few["waits"])
    assert list(waits.values()) == [3, 3] and all(line.startswith("loop.py: ") for line in waits), waits


def test_a_run_goes_on_and_is_used(library, folder):
    config = write_config(folder, "used", save_strategy="steps", save_steps=2, max_steps=4, use_4bit=True)
    run = folder / "runs/used"
    on_cuda(library, folder, ("train", config))
    whole = (run / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step-4")
    for left in ("adapter_model.safetensors", "summary.json"):
        (run / left).unlink()
    out, _ = on_cuda(
        library, folder, ("train", config, "--resume"), ("eval", run, "--dataset", "rows.jsonl"),
        ("generate", run, "--prompt", "1+1", "--max-new-tokens", "4"), ("merge", run, "merged"),
    )  # fmt: skip
    assert "step-2" in out and (run / "adapter_model.safetensors").read_bytes() == whole
    assert "generated_rows         6\n" in out and (folder / "merged/model.safetensors").exists()
