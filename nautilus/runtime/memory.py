"""How the process deals with freed memory."""

from __future__ import annotations

import ctypes


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor instead of handing it back; False on other systems.

    A training step frees and asks for the same large tensors again and again, and each fresh one costs a page fault
    per 4 KiB. The price: the process keeps its largest size to the end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(arena_max, 1))
