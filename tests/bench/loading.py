"""Loading and quantizing a checkpoint to NF4: mini_forge beside transformers + bitsandbytes, time and peak memory.

    python tests/bench/loading.py --peer-python peers/bin/python [--gigabytes 1] [--pairs 3] [--folder FOLDER]

Run it with mini_forge's own Python. A Llama-shaped bfloat16 checkpoint of random values is written in shards of a
quarter of it (kept where --folder is given), then each side loads it in a process of its own, in turn. Both quantize
all linear layers but the head, compute in bfloat16, and find the files in the page cache. Seconds are those of the one
call that loads, imports not counted. Memory is the process's peak resident set once all weights have been touched
(mapped files count from then on), and how far that is above the set before the call. Linux only: it reads /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import spread

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARDS = 4


def main():
    args = parse()
    if args.side:
        print(json.dumps(load(args.side, args.folder)))
        return
    from compare import cpu_name

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        size = write_checkpoint(folder, args.gigabytes)
        print(f"{time.strftime('%Y-%m-%d')} {cpu_name()}, {os.cpu_count()} cores; {size / 1e9:.2f} GB in bfloat16, "
              f"{SHARDS} shards, {args.pairs} pairs")  # fmt: skip
        pairs = []
        for _ in range(args.pairs):
            pairs.append([measure(python, side, folder)
                          for side, python in (("ours", sys.executable), ("peer", args.peer_python))])  # fmt: skip
    report(pairs)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python of the environment with transformers and bitsandbytes")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoint is written and stays; default: a temporary folder")
    parser.add_argument("--side", choices=("ours", "peer"), help="load --folder once and print a record (used within)")
    args = parser.parse_args()
    if not args.side and not args.peer_python:
        parser.error("--peer-python is needed")
    return args


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """As many layers as make up that size. Returns the bytes of all tensors."""
    import torch
    from safetensors.torch import save_file

    from mini_forge.model.decoder import Decoder
    from mini_forge.model.families import decoder_spec

    with torch.device("meta"):
        models = [Decoder(decoder_spec({**CONFIG, "num_hidden_layers": count})) for count in (1, 2)]
    one, two = (2 * sum(p.numel() for p in model.parameters()) for model in models)
    config = {**CONFIG, "num_hidden_layers": 1 + max(0, round((gigabytes * 1e9 - one) / (two - one)))}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(decoder_spec(config)).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    generator, names, index, size = torch.Generator().manual_seed(0), list(shapes), {}, 0
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        own = names[len(names) * i // SHARDS : len(names) * (i + 1) // SHARDS]
        tensors = {n: torch.randn(shapes[n], generator=generator).mul_(0.02).bfloat16() for n in own}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
        size += sum(t.nbytes for t in tensors.values())
    record = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(config))
    return size


def load(side: str, folder: str) -> dict:
    import torch

    if side == "ours":
        import mini_forge

        load_model = mini_forge.load_model
        options = {"dtype": torch.bfloat16, "quantization": "nf4"}
    else:
        import bitsandbytes  # noqa: F401  (no part of the time)
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        load_model = LlamaForCausalLM.from_pretrained
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        options = {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": "cpu"}
    before, started = memory("VmRSS"), time.perf_counter()
    model = load_model(folder, **options)
    seconds = time.perf_counter() - started
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.flatten()[::1024].sum()
    peak, layer = memory("VmHWM"), type(model.model.layers[0].mlp.up_proj).__name__
    return {"side": side, "seconds": seconds, "peak": peak, "rise": peak - before, "layer": layer,
            "threads": torch.get_num_threads()}  # fmt: skip


def memory(field: str) -> int:
    """Bytes of "VmRSS", resident now, or "VmHWM", the most so far; getrusage would count the parent's peak too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(python: str, side: str, folder: Path) -> dict:
    command = [python, Path(__file__), "--side", side, "--folder", folder]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nloading ({side}) ended with {done.returncode}")
    record = json.loads(done.stdout.splitlines()[-1])
    print(f"{side:5} {record['seconds']:7.2f} s, peak {record['peak'] / 2**20:6.0f} MiB, "
          f"{record['rise'] / 2**20:6.0f} MiB above the imports; {record['layer']}, "
          f"{record['threads']} threads", flush=True)  # fmt: skip
    return record


def report(pairs: list[list[dict]]):
    """Ours over the peer's, pair by pair."""
    print(f"\n{'ours / transformers+bitsandbytes':34} {'median':>7} {'min':>7} {'max':>7}")
    titles = {"seconds": "seconds", "peak": "peak resident memory", "rise": "its rise while loading"}
    for key, title in titles.items():
        ratios = [ours[key] / peer[key] for ours, peer in pairs]
        print(f"{title:34} {spread(ratios)}")


if __name__ == "__main__":
    main()
