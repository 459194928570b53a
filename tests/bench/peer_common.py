"""What both trainers of the peer share: the model, the adapter, the settings, the clock."""

import time

import torch
from bench_common import LORA, OPTIMIZATION, TARGETS, WARMUP_RATIO, print_result
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every optimizer step, and when the first one ended."""

    def __init__(self):
        self.seconds, self.first_step_at, self._began = [], None, 0.0

    def on_step_begin(self, *_, **__):
        self._began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self._began)
        self.first_step_at = self.first_step_at or time.time()


def load_model(args):
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if args.nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(args.model, **options)


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **LORA)


def settings(args, folder: str) -> dict:
    """What SFTConfig and DPOConfig have in common; `args` of `bench_common.arguments`."""
    return {
        "output_dir": folder, "num_train_epochs": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": args.ckpt, "warmup_steps": WARMUP_RATIO, "train_sampling_strategy": "sequential",
        "optim": "adamw_torch", "use_cpu": True, "bf16": False, "seed": 42, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, **OPTIMIZATION,
    }  # fmt: skip


def run(trainer, clock: Clock, started: float):
    """Train, and print the result. started: time.time() when the process was spawned."""
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print_result("TRL+PEFT", clock.seconds, losses, clock.first_step_at, started)
