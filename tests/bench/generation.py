"""Greedy generation with an adapter, token by token: mini_forge beside transformers + PEFT, tokens/s and memory.

    python tests/bench/generation.py --peer-python peers/bin/python --model FOLDER --data gsm8k.jsonl
                                     [--batches 1 8] [--tokens 64] [--pairs 3] [--nf4]

Run it with mini_forge's own Python. One adapter of random factors, rank 16 on all linears, is written for both; each
side, in a process of its own, in turn, continues the same prompts (the `input` of the data's first rows), exactly
`--tokens` tokens each, computing in float32, base in float32 (mini_forge's as stored) or NF4. A first, short generation
is no part of the time; reading the prompts is. Says how many of the tokens agree: greedy texts part for good where two
logits are as good as equal. Memory is the process's peak resident set. Linux only: it reads /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import LORA, TARGETS, read_rows, spread

SIDES = {"ours": "mini_forge", "peer": "transformers+PEFT"}


def main():
    args = parse()
    if args.side:
        print(json.dumps(measured(args)))
        return
    from compare import PEER_ENVIRONMENT, cpu_name

    print(f"{time.strftime('%Y-%m-%d')} {cpu_name()}, {os.cpu_count()} cores; {args.tokens} tokens a prompt, "
          f"{'NF4' if args.nf4 else 'dense'}, {args.pairs} pairs")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(args.model, folder)
        for batch in args.batches:
            pairs = [
                {side: run(args, side, folder, batch, PEER_ENVIRONMENT) for side in SIDES} for _ in range(args.pairs)
            ]
            report(batch, pairs)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python of the environment with transformers and PEFT")
    parser.add_argument("--model", required=True, help="a local checkpoint folder in Hugging Face layout")
    parser.add_argument("--data", required=True, help="JSONL with `input`")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--nf4", action="store_true", help="base in NF4, computing in float32")
    parser.add_argument("--side", choices=SIDES, help="generate once and print a record (used within)")
    parser.add_argument("--adapter", help="its adapter (used within)")
    args = parser.parse_args()
    if not args.side and not args.peer_python:
        parser.error("--peer-python is needed")
    return args


def write_adapter(model_folder: str, folder: str):
    import torch

    import mini_forge

    model, generator = mini_forge.load_model(model_folder), torch.Generator().manual_seed(0)
    spec = mini_forge.LoraSpec(LORA["r"], LORA["lora_alpha"], targets=tuple(TARGETS))
    mini_forge.inject(model, spec, generator)
    for module in model.modules():
        if isinstance(module, mini_forge.LoRALinear):
            module.lora_B.data.normal_(std=0.01, generator=generator)
    mini_forge.save_adapter(folder, model, spec, str(Path(model_folder).resolve()))


def run(args, side: str, adapter: str, batch: int, peer_environment: dict[str, str]) -> dict:
    """The record of one side, in a process of its own."""
    python = sys.executable if side == "ours" else args.peer_python
    command = [python, __file__, "--side", side, "--model", args.model, "--data", args.data, "--adapter", adapter,
               "--batches", str(batch), "--tokens", str(args.tokens), *(["--nf4"] if args.nf4 else [])]  # fmt: skip
    environment = peer_environment if side == "peer" else {}
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\ngeneration ({side}) ended with {done.returncode}")
    record = json.loads(done.stdout.splitlines()[-1])
    print(f"{SIDES[side]:18} {batch} at a time: {batch * args.tokens / record['seconds']:6.1f} tokens/s, "
          f"{record['peak'] / 2**20:6.0f} MiB", flush=True)  # fmt: skip
    return record


def measured(args) -> dict:
    from loading import memory
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    prompts = [tokenizer.encode(row["input"]).ids for row in read_rows(args.data)[: args.batches[0]]]
    continued = (load_ours if args.side == "ours" else load_peer)(args)
    continued(prompts, 2)
    started = time.perf_counter()
    new = continued(prompts, args.tokens)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "new": new, "peak": memory("VmHWM")}


def load_ours(args):
    import mini_forge

    ops = mini_forge.PROVIDERS["unsloth"]("cpu").ops
    options = {"quantization": "nf4"} if args.nf4 else {}
    model = mini_forge.load_model(args.adapter, ops=ops, **options)
    return lambda prompts, tokens: mini_forge.generate(model, prompts, max_new_tokens=tokens)


def load_peer(args):
    import torch
    from peer_common import load_model
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(args), args.adapter).eval()

    def continued(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens,
                                 min_new_tokens=tokens, eos_token_id=None, pad_token_id=0)  # fmt: skip
        return out[:, longest:].tolist()

    return continued


def report(batch: int, pairs: list[dict]):
    """Ours over the peer's, pair by pair."""
    for key, title in (("seconds", "seconds"), ("peak", "peak resident memory")):
        ratios = [pair["ours"][key] / pair["peer"][key] for pair in pairs]
        print(f"{batch} at a time, ours / {SIDES['peer']}: {title:20} {spread(ratios)}")
    ours, peer = ([token for row in pairs[0][side]["new"] for token in row] for side in SIDES)
    print(f"{sum(a == b for a, b in zip(ours, peer, strict=True))} of {len(ours)} tokens agree")


if __name__ == "__main__":
    main()
