"""Reward models on disk: an adapter with a score head in PEFT's format, a Hugging Face sequence classifier, or a
Python function.

An adapter's folder is that of `adapters.py` with `task_type` SEQ_CLS and one tensor more,
`base_model.model.score.weight` (1, D) float32, so it loads in PEFT on AutoModelForSequenceClassification. There a score
is read at the last token that is not `pad_token_id`: where a base's padding token is its end token (as SmolLM2's), set
`model.config.pad_token_id` to another one, or to None, to score what we score, the end token.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mini_forge.errors import CheckpointError, ConfigError, SignalExit
from mini_forge.io.adapters import (
    NEUTRAL,
    PREFIX,
    WEIGHTS_FILE,
    lora_spec,
    named_base,
    read_adapter_tensors,
    save_adapter,
    stored_tensors,
    unfit,
)
from mini_forge.io.expert_adapters import fuse, stack_targets
from mini_forge.io.hub import resolve_model
from mini_forge.io.models import is_adapter
from mini_forge.io.runs import REWARD_FOLDER
from mini_forge.io.safetensors_file import write_tensors
from mini_forge.io.weights import Loader, load_base
from mini_forge.json_faults import read_json
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import Factors, LoRALinear, LoraSpec, LoRAStack, inject, lora_layers, target_names
from mini_forge.model.ops import PLAIN

SCORE = "score.weight"


@dataclass(frozen=True)
class StoredReward:
    """A reward model as loaded. `model`: the one that was given, if it can lend its backbone, else one of its own.

    factors: the adapter to be swapped in on `model`, on its device; None for a model without one. score: (1, D)
    float32. pad_id: a token passed over when looking for the last one."""

    model: Decoder
    factors: Factors | None
    score: torch.Tensor
    pad_id: int | None = None


def save_reward(folder: Path, model: Decoder, head: torch.nn.Module, spec: LoraSpec, base_name: str):
    """Write the model's adapter and the head's `score` into `folder`, which exists."""
    save_adapter(folder, model, spec, base_name)
    tensors = stored_tensors(folder / WEIGHTS_FILE)
    tensors[PREFIX + SCORE] = head.score.weight.detach().float().cpu().contiguous()
    beside = folder / f"{WEIGHTS_FILE}.part"  # not over the file itself: the tensors are mapped from it
    write_tensors(beside, tensors)
    beside.replace(folder / WEIGHTS_FILE)
    record = read_json(folder / "adapter_config.json") | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (folder / "adapter_config.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_reward(source: str | Path, model: Decoder, model_name: str, **options) -> StoredReward:
    """The reward model of a folder (or hub ID): an adapter we saved, or a sequence classifier.

    An adapter of the model that is in memory already (`model_name` names its base), on layers that it adapts, takes no
    second backbone; anything else is loaded, with `options` for `load_base`. Raises CheckpointError for a folder that
    is neither, or does not fit."""
    inner = Path(source).expanduser() / REWARD_FOLDER
    if is_adapter(inner):
        raise CheckpointError(f"reward_model: {source} is an rlhf run; its reward model is {inner}, name that")
    if not is_adapter(source):
        return _load_classifier(resolve_model(str(source), "reward_model"), **options)
    folder = Path(source).expanduser()
    spec, base_name = read_reward_config(folder)
    base = _base(folder, base_name)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_adapter_tensors(folder).items()}
    score = tensors.pop(SCORE, None)
    if score is None:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: no tensor {PREFIX + SCORE}; a reward model needs its head")
    live = {name for name, _ in lora_layers(model)}
    if base.resolve() != resolve_model(model_name).resolve() or not set(_names(model, spec, tensors, folder)) <= live:
        model = load_base(base, **options)
        with model.device:
            inject(model, LoraSpec(spec.rank, spec.alpha, 0.0, stack_targets(spec.targets, tensors), spec.use_rslora))
    names = _names(model, spec, tensors, folder)
    factors = _factors(model, names, tensors, spec, folder / WEIGHTS_FILE)
    return StoredReward(model, factors, _checked_score(score, model, folder))


def read_reward_config(folder: Path) -> tuple[LoraSpec, str]:
    """The reward adapter's LoraSpec and its base model's name. Raises CheckpointError for another kind of adapter."""
    path = folder / "adapter_config.json"
    record = read_json(path)
    wanted = {"peft_type": ("LORA",), "task_type": ("SEQ_CLS",)}
    wanted |= NEUTRAL | {"modules_to_save": (["score"], ["classifier", "score"])}
    for key, values in wanted.items():
        if record.get(key) not in values:
            raise CheckpointError(
                f"{path}: {key} = {record.get(key)!r} is not that of a reward model; it must be {values[-1]!r}"
            )
    return replace(lora_spec(record, path), dropout=0.0), named_base(record, path)


def load_function(name: str) -> Callable:
    """The function of "module:function", the module being found as Python finds it, then in the current folder. Raises
    ConfigError where there is none."""
    module_name, _, function_name = name.partition(":")
    place = str(Path.cwd().resolve())
    if place not in sys.path:  # last, and for good: it hides no installed module, and a neighbour may be imported later
        sys.path.append(place)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except SignalExit:
        raise
    except (Exception, SystemExit) as error:  # any: it is not our code
        if isinstance(error, ModuleNotFoundError) and error.name in _parents(module_name):
            remedy = f"write {module_name}.py there"
            if module_name.endswith(".py"):
                remedy = f"leave .py out: {module_name.removesuffix('.py')}:{function_name}"
            problem = f"there is no module {error.name!r} in {place}; {remedy}"
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"importing it raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        raise ConfigError(f"reward_function: {name!r}: {problem}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no" if function is None else "has no function"
        file = getattr(module, "__file__", None) or "built in"
        raise ConfigError(
            f"reward_function: {name!r}: module {module_name!r} ({file}) {what} {function_name!r}; it must hold a "
            "function (prompts, responses, rows) -> list of numbers"
        )
    return function


def _parents(module_name: str) -> list[str]:
    """ "a.b.c" → a, a.b, a.b.c."""
    parts = module_name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _base(folder: Path, name: str) -> Path:
    if not name:
        raise CheckpointError(f"{folder}/adapter_config.json: base_model_name_or_path is empty; name the base there")
    return resolve_model(name, f"{folder}/adapter_config.json: base_model_name_or_path")


def _names(model: Decoder, spec: LoraSpec, tensors: dict, folder: Path) -> list[str]:
    """The layers that the adapter is for."""
    try:
        return target_names(model, stack_targets(spec.targets, tensors))
    except ConfigError as error:
        raise CheckpointError(f"{folder}/adapter_config.json: {error}") from None


def _factors(model: Decoder, names: list[str], tensors: dict, spec: LoraSpec, path: Path) -> dict:
    """The adapter's factors for the layers `names`, each checked, on the model's device."""
    layers = {name: layer for name, layer in lora_layers(model) if name in set(names)}
    stacks = [name for name in names if isinstance(layers[name], LoRAStack)]
    if stacks:
        tensors = fuse(tensors, stacks, model.spec.experts.count, model.layout)
    factors, used = {}, set()
    for name in names:
        suffix = "" if name in stacks else ".weight"
        keys = [f"{name}.lora_{letter}{suffix}" for letter in "AB"]
        if any(key not in tensors for key in keys):
            raise unfit(path, f"does not fit this model: no adapter of {name}")
        # copies: what was read is a map of the file, which may be written anew
        A, B = (tensors[key].to(model.device, torch.float32, copy=True) for key in keys)
        _check_shapes(path, name, A, B, layers[name], spec.rank)
        factors[name] = (A, B, spec.scaling)
        used.update(keys)
    unexpected = sorted(tensors.keys() - used)
    if unexpected:
        raise unfit(path, f"does not fit this model: {len(unexpected)} unexpected {unexpected[:3]}")
    return factors


def _check_shapes(path: Path, name: str, A: torch.Tensor, B: torch.Tensor, layer: LoRALinear | LoRAStack, rank: int):
    experts, width, out = layer.lora_A.shape[:-2], layer.lora_A.shape[-1], layer.lora_B.shape[-2]
    if A.shape != (*experts, rank, width) or B.shape != (*experts, out, rank):
        needs = f"the model needs {[*experts, rank, width]} and {[*experts, out, rank]}"
        raise unfit(path, f"{name} has factors {list(A.shape)} and {list(B.shape)}, {needs}")


def _load_classifier(folder: Path, dtype=torch.float32, device="cpu", quantization=None, *, nested=False,
                     compute_dtype=None, ops=PLAIN, headers_only=False) -> StoredReward:  # fmt: skip
    """A Hugging Face `…ForSequenceClassification` folder with one label: a decoder without output matrix, and `score`.

    Its score is read as transformers reads it: at the last token that is not its config's `pad_token_id`."""
    loader = Loader(folder, dtype, device, quantization, nested, compute_dtype, ops)
    checkpoint, model = loader.checkpoint, loader.model
    if SCORE not in checkpoint.entries:
        raise CheckpointError(f"reward_model: {folder} has no tensor {SCORE!r}, so it is no reward model; give a "
                              "sequence classifier, or an adapter that was saved as `reward/`")  # fmt: skip
    score = checkpoint.read(SCORE)
    del checkpoint.entries[SCORE]  # no part of the decoder, which takes no tensor it does not know
    if model.lm_head is not None and "lm_head.weight" not in checkpoint.entries:
        model.lm_head = None  # a classifier has none, and nothing asks for its logits
        loader.missing.discard("lm_head.weight")
    loader.load_all(headers_only)
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    model = model.eval().requires_grad_(False)
    return StoredReward(model, None, _checked_score(score, model, folder), text_config.get("pad_token_id"))


def _checked_score(score: torch.Tensor, model: Decoder, folder: Path) -> torch.Tensor:
    width = model.spec.hidden_size
    if tuple(score.shape) != (1, width):
        raise CheckpointError(
            f"reward_model: {folder}: {SCORE} has shape {list(score.shape)}; one label on {width} features is needed, "
            f"[1, {width}]"
        )
    return score.to(model.device, torch.float32, copy=True)
