"""Models by name, with random weights and rows of random tokens: a run's cost can be measured without a download.

`SHAPES` holds the keys of each model's public config.json that decide what it computes, under the name of the hub
repository. A decoder of it is filled a tensor at a time and quantized on arrival, so that memory holds what the loaded
checkpoint would take and one dense matrix.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mini_forge.config import TrainingConfig, detect_machine, resolve
from mini_forge.data.batches import Document, TokenStats
from mini_forge.data.pairs import PairDocument
from mini_forge.errors import ConfigError
from mini_forge.forms import PAIRS, form_of
from mini_forge.inputs import adapter_spec
from mini_forge.io.storage import Storage, multiplies_stored
from mini_forge.io.weights import bfloat16_matrices
from mini_forge.json_faults import read_json
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec, expert_layout
from mini_forge.model.lora import target_names
from mini_forge.model.ops import PLAIN, Ops
from mini_forge.model.quant import Linear16bit
from mini_forge.model.stacks import Stack4bit, Stack8bit, StackMxfp4, use_kernels
from mini_forge.prepare import Prepared

DEFAULT_LENGTH = 512  # tokens of a row
DEVIATION = 0.02  # of the weights: what most of these models started from
MXFP4_SCALE = 120  # 2^(120 − 127): the sixteen FP4 values have a deviation of 3, so weights have about DEVIATION


def _dense(kind, width, mlp, layers, heads, kv_heads, head_size, vocab, positions, theta, tied, eps=1e-5, **more):
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_size, "vocab_size": vocab,
        "max_position_embeddings": positions, "rope_theta": theta, "tie_word_embeddings": tied, "rms_norm_eps": eps,
        **more,
    }  # fmt: skip


def _llama3_rope(factor):
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}}  # fmt: skip


def _gpt_oss(layers, experts):
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096}  # fmt: skip
    return _dense(
        "gpt_oss", 2880, 2880, layers, 64, 8, 64, 201088, 131072, 150000.0, False, num_local_experts=experts,
        num_experts_per_tok=4, sliding_window=128, swiglu_limit=7.0, attention_bias=True, rope_scaling=rope,
        quantization_config={"quant_method": "mxfp4"},
    )  # fmt: skip


def _qwen3_moe(width, layers, experts_size):
    return _dense(
        "qwen3_moe", width, 3 * width, layers, 32, 4, 128, 151936, 40960, 1e6, False, 1e-6, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=experts_size, norm_topk_prob=True, decoder_sparse_step=1,
    )  # fmt: skip


SHAPES = {
    "smollm2-135m": _dense("llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, 1e5, True),
    "smollm2-1.7b": _dense("llama", 2048, 8192, 24, 32, 32, 64, 49152, 8192, 1.3e5, True),
    "llama-3.2-1b": _dense("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, True, **_llama3_rope(32.0)),
    "llama-3.2-3b": _dense("llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, True, **_llama3_rope(32.0)),
    "llama-3.1-8b": _dense("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, False, **_llama3_rope(8.0)),
    "llama-3.1-70b": _dense("llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, 5e5, False, **_llama3_rope(8.0)),
    "mistral-7b-v0.3": _dense("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, False),
    "qwen2.5-0.5b": _dense("qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, 1e6, True, 1e-6),
    "qwen2.5-7b": _dense("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, 1e6, False, 1e-6),
    "qwen3-0.6b": _dense("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, True, 1e-6),
    "qwen3-8b": _dense("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, 1e6, False, 1e-6),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 768),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}


def shape_record(name: str) -> dict:
    """The config.json of a named shape. Raises ConfigError for a name that is not known."""
    if name not in SHAPES:
        raise ConfigError(f"--shape: {name!r} is not known; use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def prepare_shape(config: TrainingConfig, name: str, length: int | None, steps: int, folder: Path) -> Prepared:
    """What `prepare` gives, of a named shape: rows of `length` tokens (by default max_seq_length, else DEFAULT_LENGTH)
    drawn uniformly by the seed, all trained on, enough for `steps`. Its config.json is written into `folder`."""
    record = shape_record(name)
    (folder / "config.json").write_text(json.dumps(record))
    spec, plan = decoder_spec(record), resolve(config, detect_machine(config.device))
    with torch.device("meta"):
        target_names(Decoder(spec), adapter_spec(config).targets)
    length = length or config.max_seq_length or DEFAULT_LENGTH
    rows = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    generator = np.random.default_rng(config.seed)

    def document(line):
        ids = generator.integers(0, spec.vocab_size, length + 1, dtype=np.int32)
        return Document(ids, np.arange(length + 1) > 0, line)

    is_paired = form_of(config) is PAIRS
    train = [PairDocument(document(i), document(i)) if is_paired else document(i) for i in range(1, rows + 1)]
    sides = 2 if is_paired else 1
    stats = TokenStats(rows, rows, 0, 0, sides * rows * (length + 1), sides * rows * length)
    notes = [*config.warnings, *plan.notes, f"rows of {length} random tokens, all trained on"]
    if length > spec.max_positions:
        notes.append(f"{length} tokens are more than the {spec.max_positions} positions the model was made for")
    config = replace(config, model_name=name)
    return Prepared(config, plan, folder, spec, None, None, length, train, stats, [], None, notes)


def random_base(
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    *,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    ops: Ops = PLAIN,
) -> Decoder:
    """`load_base` of a folder that has no weights: those its config.json describes, drawn from torch's global state.

    Matrices are normal with deviation DEVIATION, norms the identity; experts are MXFP4 where config.json says so, and
    other matrices in bfloat16, where those of a checkpoint are kept so (`bfloat16_matrices`)."""
    record = read_json(Path(folder) / "config.json")
    with torch.device("meta"):
        model = Decoder(decoder_spec(record), ops)
    model.layout = expert_layout(record)
    storage = Storage(quantization, nested, compute_dtype or dtype, dtype, torch.device(device))
    in_bfloat16 = bfloat16_matrices(Path(folder), model) if multiplies_stored(ops, dtype, device) else ()
    is_mxfp4 = (record.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in list(model.named_parameters()):
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if parameter.dim() == 3:
            delattr(owner, leaf)  # a parameter's place does not take a module
            setattr(owner, leaf, _random_stack(tuple(parameter.shape), storage, is_mxfp4))
        elif quantization is not None and name in linears and name != "lm_head.weight":
            model.set_submodule(owner_name, storage.quantized(_drawn(parameter.shape, storage)))
        elif name in in_bfloat16 and name in linears:
            weight = _drawn(parameter.shape, replace(storage, dtype=torch.bfloat16))
            model.set_submodule(owner_name, Linear16bit(weight, owner.bias, ops.stored_products))
        else:
            own = replace(storage, dtype=torch.bfloat16) if name in in_bfloat16 else storage
            value = _drawn(parameter.shape, own)
            if parameter.dim() == 1 and name.endswith("norm.weight"):
                value.fill_(1 - model.spec.norm_offset)
            setattr(owner, leaf, _frozen(value))
    use_kernels(model, ops)
    return model.eval().requires_grad_(False)


def _random_stack(shape: tuple[int, int, int], storage: Storage, is_mxfp4: bool) -> nn.Parameter | nn.Module:
    """E matrices (out, in) as loading would hold them; what is quantized is drawn an expert at a time."""
    options = {"compute_dtype": storage.compute_dtype, "device": storage.device}
    if is_mxfp4:
        stack = StackMxfp4.empty(*shape, **options)
        stack.blocks.random_(0, 256)
        stack.scales.fill_(MXFP4_SCALE)
        return stack
    if storage.quantization is None:
        return _frozen(_drawn(shape, storage))
    if storage.quantization == "int8":
        stack = Stack8bit.empty(*shape, **options)
    else:
        stack = Stack4bit.empty(*shape, quant_type=storage.quantization, nested=storage.nested, **options)
    for e in range(shape[0]):
        stack.put(e, _drawn(shape[1:], storage))
    return stack


def _drawn(shape, storage: Storage) -> torch.Tensor:
    return torch.empty(shape, dtype=storage.dtype, device=storage.device).normal_(0, DEVIATION)


def _frozen(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
