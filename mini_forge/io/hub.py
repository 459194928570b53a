"""Where a model lies: a folder, or a repository of the hub in the local cache or downloaded."""

import os
from pathlib import Path

from mini_forge.errors import CheckpointError


def resolve_model(name: str, key: str = "model_name") -> Path:
    """The folder of a model: `name` itself if it is one, else a hub ID in the local cache, else downloaded.

    key: what an error calls it."""
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # unlike Path's own, which raises for a name that no folder can have
        return folder
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if os.path.exists(folder) or not is_hub_id:
        raise CheckpointError(f"{key}: {name!r} is not a folder; give a model folder or a hub ID `owner/name`")
    return _from_hub(name, key)


def _from_hub(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{key}: {name!r} is neither a folder nor in the local hub cache, and the download failed: {reason}; "
            "give a model folder, or download it where there is a network"
        ) from None
