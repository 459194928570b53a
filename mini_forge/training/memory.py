"""Keep freed memory for the next step instead of giving it back to the system.

glibc returns every large freed block at once, and the kernel clears each page again on its next use; a training step
frees and asks for the same few hundred megabytes hundreds of times. Raising the two thresholds keeps the blocks in the
process. Peak memory does not grow: blocks are reused, not hoarded.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Set the thresholds for this process. Returns whether the C library is one that has them (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST) and library.mallopt(M_TRIM_THRESHOLD, LARGEST))
