"""The peer: LoRA or QLoRA fine-tuning of a local checkpoint on the CPU with TRL and PEFT, as they document it.

    HF_HUB_OFFLINE=1 python tests/bench/peer_sft.py --model FOLDER --data ROWS.jsonl [--ckpt] [--packing] [--nf4]

Trains once over the rows, in their order, and prints one JSON line. Usually started by compare.py.
"""

import tempfile

from bench_common import BATCH, MAX_LENGTH, arguments, read_rows

args = arguments(__doc__)

import torch  # noqa: E402  (after the clock has started)
from datasets import Dataset  # noqa: E402
from peer_common import Clock, load_model, lora, run, settings  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


def dataset() -> Dataset:
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": row["input"]}],
         "completion": [{"role": "assistant", "content": row["output"]}]}
        for row in read_rows(args.data)
    ])  # fmt: skip


def main():
    torch.manual_seed(42)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            per_device_train_batch_size=BATCH, max_length=MAX_LENGTH, packing=args.packing, completion_only_loss=True,
            **settings(args, folder),
        )  # fmt: skip
        trainer = SFTTrainer(
            model=load_model(args), args=config, train_dataset=dataset(), peft_config=lora(), callbacks=[clock],
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )  # fmt: skip
        run(trainer, clock, args.started)


if __name__ == "__main__":
    main()
