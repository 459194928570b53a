"""Imports of torch, and of what needs it, in less time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(is_own_process: bool = False) -> Iterator[None]:
    """No garbage collections meanwhile: each would look through all that torch has made by then, some 300,000 objects.

    is_own_process: later ones leave aside what there is in the end, for good. Not where somebody else's objects may lie
    about: what becomes garbage of these would stay. With it `check` takes 1.7 s where it took 2.1."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_own_process:
            gc.freeze()
        if collects:
            gc.enable()
