"""Adapters on disk, in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

Tensor names are `base_model.model.<module>.lora_A.weight` (R, in) and `….lora_B.weight` (out, R), float32. An rsLoRA
adapter is written with `lora_alpha` = α·√R and `use_rslora` false, the same scaling to readers that only know α/R.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mini_forge.errors import CheckpointError, reason_of
from mini_forge.io.expert_adapters import fuse, fused_tensors, own_name, per_expert_tensors, stack_targets
from mini_forge.io.safetensors_file import write_tensors
from mini_forge.json_faults import read_json
from mini_forge.model.decoder import Decoder
from mini_forge.model.families.layout import without_text_prefix
from mini_forge.model.lora import LoraSpec, LoRAStack, inject, lora_layers, target_names

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_RANK = 1 << 20  # no adapter has more; of a damaged file's torch cannot even say so
# Fields of adapter_config.json that change the mathematics, with the values under which they do not.
NEUTRAL = {
    "use_dora": (None, False), "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "bias": (None, "none"), "fan_in_fan_out": (None, False), "layers_to_transform": (None, []),
    "lora_bias": (None, False), "trainable_token_indices": (None, []),
    "exclude_modules": (None, []), "layer_replication": (None, []),
    # Others, like "pissa", take a part out of the base's weights whenever the adapter is loaded.
    "init_lora_weights": (None, False, "gaussian", "orthogonal", "eva", True),
}  # fmt: skip


def save_adapter(folder: str | Path, model: Decoder, spec: LoraSpec, base_name: str, expert_format: str = "peft"):
    """Write the model's LoRA layers into `folder`, in PEFT's format. base_name: the base's folder or hub ID, for those
    who will load it. expert_format: one of expert_adapters.FORMATS."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = dict(lora_layers(model))
    stacks = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAStack)}
    is_fused = expert_format == "peft"
    tensors = (fused_tensors if is_fused else per_expert_tensors)(stacks, model.layout)
    for name, layer in layers.items():
        if name not in stacks:
            tensors[f"{name}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
            tensors[f"{name}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()

    def others(name: str) -> str:  # name for a module or tensor of ours
        return model.text_model + name.removeprefix("model.")

    write_tensors(folder / WEIGHTS_FILE, {f"{PREFIX}{others(name)}": tensor for name, tensor in tensors.items()})
    modules = {name.rsplit(".", 1)[-1] for name in layers if name not in stacks}
    parameters = {".".join(name.split(".")[-3:]) for name in stacks}
    # Short names would name others too, of this text model or of the model that it is a part of.
    is_part = model.text_model != "model."
    if is_fused and (is_part or set(target_names(model, (*modules, *parameters))) != set(layers)):
        modules, parameters = {others(name) for name in layers.keys() - stacks.keys()}, set(map(others, stacks))
    if stacks and not is_fused:  # as if each expert were three linear layers
        modules |= {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in tensors}
        parameters = set()
    record = _config_record(spec, sorted(modules), base_name)
    if parameters:
        record["lora_dropout"] = 0.0  # PEFT refuses another beside target_parameters; it matters in training alone
        record["target_parameters"] = sorted(parameters, reverse=True)  # PEFT wraps in this order, gate_up innermost
    (folder / "adapter_config.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _config_record(spec: LoraSpec, targets: list[str], base_name: str) -> dict:
    alpha = spec.alpha * math.sqrt(spec.rank) if spec.use_rslora else spec.alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def read_adapter_config(folder: Path) -> tuple[LoraSpec, str]:
    """The adapter's LoraSpec and its base model's name. Raises CheckpointError for what is not supported."""
    path = folder / "adapter_config.json"
    record = read_json(path)
    if record.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {record.get('peft_type')!r} is not supported; supported: 'LORA'")
    if record.get("task_type") == "SEQ_CLS":
        raise CheckpointError(
            f"{path}: task_type 'SEQ_CLS' is that of a reward model, which scores texts and writes none; "
            "give a run's own folder, or name this one as reward_model"
        )
    for key, neutral in NEUTRAL.items():
        if record.get(key) not in neutral:
            raise CheckpointError(
                f"{path}: {key} = {record[key]!r} is not supported, plain LoRA only; train an adapter without it"
            )
    return lora_spec(record, path), named_base(record, path)


def named_base(record: dict, path: Path) -> str:
    """The base model that adapter_config.json's `record` names, "" for none; `path` is for errors, CheckpointError."""
    name = record.get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: base_model_name_or_path {name!r} must be a text; name the base model there")
    return name


def lora_spec(record: dict, path: Path) -> LoraSpec:
    """The LoRA that adapter_config.json's `record` describes; `path` is for errors, CheckpointError."""
    targets, parameters = record.get("target_modules"), record.get("target_parameters") or []
    if isinstance(targets, str):  # a pattern's modules are those that have tensors
        targets = [targets] if targets == "all-linear" else _adapted_modules(path.with_name(WEIGHTS_FILE))
    targets = targets or []
    for key, names in {"target_modules": targets, "target_parameters": parameters}.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: {key} {record[key]!r} must be a list of names; write them so")
    rank, alpha, dropout = record.get("r"), record.get("lora_alpha"), record.get("lora_dropout") or 0.0
    is_rank = type(rank) is int and 1 <= rank <= MOST_RANK
    if not is_rank or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{path}: r {rank!r}, lora_alpha {alpha!r}: needs numbers `r` (at least 1) and `lora_alpha`; write them"
        )
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise CheckpointError(f"{path}: lora_dropout {dropout!r} must be a number from 0 to 1; write 0.0")
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=None
        if targets == ["all-linear"] and not parameters
        else tuple(map(without_text_prefix, (*targets, *parameters))),
        use_rslora=bool(record.get("use_rslora", False)),
    )


def load_adapter(model: Decoder, folder: Path, spec: LoraSpec | None = None) -> LoraSpec:
    """Inject LoRA as `folder` describes and fill it. Every tensor must have its place, and every place its tensor."""
    spec = spec or read_adapter_config(folder)[0]
    names = read_adapter_tensors(folder)
    inject(model, replace(spec, targets=stack_targets(spec.targets, names)))
    fill_adapter(model, folder)
    return spec


def _adapted_modules(path: Path) -> list[str]:
    """The modules that have an adapter in a file, without stacks of experts, which are `target_parameters`; of experts
    one by one, the last part of their names."""
    names = {own_name(name).removeprefix(PREFIX).partition(".lora_")[0] for name in stored_tensors(path)}
    names = {name for name in names if not name.endswith((".experts", ".experts.base_layer"))}
    return sorted({name.rpartition(".")[2] if ".experts." in name else without_text_prefix(name) for name in names})


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by PEFT's names for a model that is text alone. Raises CheckpointError for an absent or
    broken file, or a number that is none."""
    tensors = stored_tensors(folder / WEIGHTS_FILE)
    return {PREFIX + without_text_prefix(own_name(n).removeprefix(PREFIX)): tensor for n, tensor in tensors.items()}


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The same by the names that they have in the file."""
    try:
        path.open("rb").close()  # of any file that it may not read, load_file says that there is none
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: file not found; an adapter folder needs it (pickled adapters are refused)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); give a folder that can be read") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: broken safetensors file ({error}); fetch or train it again") from None
    for name, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; the file is damaged, fetch or train it again")
    return tensors


def unfit(path: Path, what: str) -> CheckpointError:
    """The error of an adapter's file that is another model's."""
    return CheckpointError(f"{path}: {what}; give the base it was trained on")


def fill_adapter(model: Decoder, folder: Path):
    """Copy the folder's adapter tensors into a model that has LoRA layers already."""
    path = folder / WEIGHTS_FILE
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_adapter_tensors(folder).items()}
    layers = dict(lora_layers(model))
    stacks = [name for name, layer in layers.items() if isinstance(layer, LoRAStack)]
    if stacks:
        tensors = fuse(tensors, stacks, model.spec.experts.count, model.layout)
    places = {}
    for name, layer in layers.items():
        suffix = "" if name in stacks else ".weight"
        places[f"{name}.lora_A{suffix}"] = layer.lora_A
        places[f"{name}.lora_B{suffix}"] = layer.lora_B
    missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or unexpected:
        found = f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        raise unfit(path, f"does not fit this model: {found}")
    for name, parameter in places.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"has shape {list(tensors[name].shape)}, the model needs {list(parameter.shape)}"
            raise unfit(path, f"{name} {shapes}")
        with torch.no_grad():
            parameter.copy_(tensors[name])
