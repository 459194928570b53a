"""Imports of torch, and of what needs it, in less time."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def quick_imports(is_own_process: bool = False) -> Iterator[None]:
    """No garbage collections meanwhile: each would look through all that torch has made by then, some 300,000 objects.

    is_own_process: later ones leave aside what there is in the end, for good. Not where somebody else's objects may lie
    about: what becomes garbage of these would stay. With it `check` takes 1.7 s where it took 2.1. And signals wait:
    raised amid torch's own initialisation they are lost there, or leave half a numpy."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with _signals_wait() if is_own_process else nullcontext():
            yield
    finally:
        if is_own_process:
            gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM come when this is over, to whoever would have had them, unless they are ignored."""
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            os.kill(os.getpid(), number)
