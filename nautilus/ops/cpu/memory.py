"""Memory for what is read again and again, such as packed matrices: in pages of 2 MiB where the system has them.

With pages of 4 KiB every core looks up so many addresses that it reads a tenth more slowly.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import time

import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer

HUGE = 1 << 21


class ReadAll(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("count", ctypes.c_int64), ("sum", ctypes.c_int64 * 64)]


def roomy(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor of zeros."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype)
    # Private: shared memory has large pages only where the system was told so. Freed with the last tensor in it.
    block = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % HUGE
    return torch.frombuffer(block, dtype=torch.uint8, offset=begin, count=size).view(dtype).view(shape)


def read_speed(memory: Tensor) -> float:
    """Bytes a second at which torch's number of threads read this memory once. Native only."""
    begin = time.perf_counter()
    call("nautilus_read_all", ReadAll(pointer(memory), memory.nbytes // 8))
    return memory.nbytes / (time.perf_counter() - begin)
