"""`load_model`: one call for a model folder, a hub ID, or the folder of a run or adapter."""

import os
from pathlib import Path

import torch

from mini_forge.data.tokenizer import Tokenizer
from mini_forge.data.tokenizer import load_tokenizer as read_tokenizer
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.io.adapters import load_adapter, read_adapter_config
from mini_forge.io.hub import resolve_model
from mini_forge.io.runs import CONFIG_FILE, RunFolder
from mini_forge.io.weights import load_base
from mini_forge.model.decoder import Decoder
from mini_forge.model.ops import PLAIN, Ops

QUANTIZATIONS = (None, "nf4", "fp4", "int8")
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What torch raises for a device: of another name, of no number, of a module or of a build of torch that is not here.
_NO_DEVICE = (RuntimeError, TypeError, ValueError, OverflowError, ImportError, AssertionError)


def is_adapter(path: str | Path) -> bool:
    file = Path(os.path.expanduser(path)) / "adapter_config.json"
    return os.path.isfile(file)  # False, too, where it cannot be looked at


def require_adapter(folder: Path, command: str):
    """Raise CheckpointError if there is no adapter in `folder`."""
    if not is_adapter(folder):
        refuse_unfinished(folder)
        raise CheckpointError(f"{folder}: no adapter_config.json; {command} takes the folder of a run or adapter")


def refuse_unfinished(folder: Path):
    """Raise CheckpointError if this folder without an adapter is a run's: before it ends, its checkpoints alone have
    one."""
    if not os.path.isfile(folder / CONFIG_FILE) or os.path.isfile(folder / "config.json"):
        return  # the latter: a whole model beside somebody's configuration
    run = RunFolder(folder)
    instead = f", or use {run.checkpoint(run.steps()[-1])}" if run.steps() else ""
    raise CheckpointError(
        f"{folder}: no adapter_config.json in this run, which has not ended, or lost it; go on with --resume{instead}"
    )


def base_of(path: str | Path) -> Path:
    """The folder of the base model: of an adapter, the one its config names; else the model itself."""
    if not is_adapter(path):
        refuse_unfinished(Path(os.path.expanduser(path)))
        return resolve_model(str(path), "model")
    name = read_adapter_config(Path(os.path.expanduser(path)))[1]
    if not name:
        raise CheckpointError(
            f"{path}/adapter_config.json: base_model_name_or_path is empty; name the base model there"
        )
    return resolve_model(name, f"{path}/adapter_config.json: base_model_name_or_path")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run, adapter or model folder, or hub ID; an adapter without one has its base's."""
    folder = Path(os.path.expanduser(path))
    return read_tokenizer(folder if os.path.isfile(folder / "tokenizer.json") else base_of(path))


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    *,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    ops: Ops = PLAIN,
) -> Decoder:
    """A decoder ready to use, in eval mode; with its LoRA layers in place if `path` is a run or adapter folder.

    dtype: of the weights that are not quantized (None: as stored). quantization: None, "nf4", "fp4" or "int8" for the
    base's linear layers. Raises CheckpointError for an unsound folder, ConfigError for another dtype, device or
    quantization."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} must be one of {', '.join(map(str, DTYPES))}")
    try:
        torch.empty(0, device=torch.device(device))
    except _NO_DEVICE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device: {device!r} cannot be used ({reason}); give another, as 'cpu'") from error
    if torch.device(device).type == "meta":
        raise ConfigError("device: 'meta' holds no numbers; give another, as 'cpu'")
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization: {quantization!r} must be one of {', '.join(map(repr, QUANTIZATIONS))}")
    options = {"nested": nested, "compute_dtype": compute_dtype, "ops": ops}
    model = load_base(base_of(path), dtype, device, quantization, **options)
    if is_adapter(path):
        load_adapter(model, Path(os.path.expanduser(path)))
    return model.eval()
