"""The peer: LoRA or QLoRA fine-tuning of a local checkpoint on the CPU with TRL and PEFT, as they document it.

    HF_HUB_OFFLINE=1 python tests/bench/peer_sft.py --model FOLDER --data ROWS.jsonl [--ckpt] [--packing] [--nf4]

Trains once over the rows, in their order, and prints one JSON line. Usually started by compare.py.
"""

import tempfile
import time

from bench_common import (
    BATCH,
    LORA,
    MAX_LENGTH,
    OPTIMIZATION,
    TARGETS,
    WARMUP_RATIO,
    arguments,
    print_result,
    read_rows,
)

args = arguments(__doc__)

import torch  # noqa: E402  (after the clock has started)
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Seconds of every optimizer step, and when the first one ended."""

    def __init__(self):
        self.seconds, self.first_step_at, self._began = [], None, 0.0

    def on_step_begin(self, *_, **__):
        self._began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self._began)
        self.first_step_at = self.first_step_at or time.time()


def load_model():
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if args.nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(args.model, **options)


def dataset() -> Dataset:
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": row["input"]}],
         "completion": [{"role": "assistant", "content": row["output"]}]}
        for row in read_rows(args.data)
    ])  # fmt: skip


def settings(folder: str) -> SFTConfig:
    return SFTConfig(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        max_length=MAX_LENGTH, packing=args.packing, gradient_checkpointing=args.ckpt, warmup_steps=WARMUP_RATIO,
        completion_only_loss=True, train_sampling_strategy="sequential", optim="adamw_torch", use_cpu=True, bf16=False,
        seed=42, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, **OPTIMIZATION,
    )  # fmt: skip


def main():
    torch.manual_seed(42)
    clock = Clock()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **LORA)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load_model(), args=settings(folder), train_dataset=dataset(), peft_config=lora, callbacks=[clock],
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )  # fmt: skip
        trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print_result("TRL+PEFT", clock.seconds, losses, clock.first_step_at, args.started)


if __name__ == "__main__":
    main()
