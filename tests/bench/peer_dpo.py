"""The peer of DPO: LoRA preference tuning of a local checkpoint on the CPU with TRL and PEFT, as they document it.

    HF_HUB_OFFLINE=1 python tests/bench/peer_dpo.py --model FOLDER --data PAIRS.jsonl --adapter FOLDER [--ckpt] [--nf4]

Trains once over the pairs, in their order, and prints one JSON line. Usually started by compare_dpo.py. The reference
is the model with its adapter off, as ours. TRL trains an adapter that is already loaded against a second copy of it, so
here the trainer makes a new one, and the initial values are put into that.
"""

import tempfile
from pathlib import Path

from bench_common import DPO, MAX_LENGTH, PAIRS, arguments, read_rows

args = arguments(__doc__, "adapter")

import torch  # noqa: E402  (after the clock has started)
from datasets import Dataset  # noqa: E402
from peer_common import Clock, load_model, lora, run, settings  # noqa: E402
from peft import set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402


def dataset() -> Dataset:
    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return Dataset.from_list([
        {"prompt": turn("user", row["prompt"]), "chosen": turn("assistant", row["chosen"]),
         "rejected": turn("assistant", row["rejected"])}
        for row in read_rows(args.data)
    ])  # fmt: skip


def main():
    torch.manual_seed(42)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        shared = {**settings(args, folder), **DPO}
        trainer = DPOTrainer(
            model=load_model(args), args=DPOConfig(per_device_train_batch_size=PAIRS, max_length=MAX_LENGTH, **shared),
            train_dataset=dataset(), peft_config=lora(), callbacks=[clock],
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )  # fmt: skip
        found = set_peft_model_state_dict(trainer.model, load_file(Path(args.adapter) / "adapter_model.safetensors"))
        if found.unexpected_keys:
            raise SystemExit(f"{args.adapter}: the trainer's adapter has no {found.unexpected_keys[0]}")
        run(trainer, clock, args.started)


if __name__ == "__main__":
    main()
