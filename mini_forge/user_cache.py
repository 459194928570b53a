"""Where this user's files that can be made again are kept: tokens of large datasets, compiled ops."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/mini_forge, or ~/.cache/mini_forge. Of a user without a home a name that can be no folder, so
    that nothing is written to, or loaded from, wherever the process happens to work: compiled ops are not kept then,
    and large datasets refused until XDG_CACHE_HOME names a folder."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = asked if asked.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return (folder if folder.is_absolute() else Path(os.devnull)) / "mini_forge"
