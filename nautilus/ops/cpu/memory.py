"""Memory for what is read again and again, such as packed matrices: in pages of 2 MiB where the system has them.

With pages of 4 KiB every core looks up so many addresses that it reads a tenth more slowly. And what they were packed
from need not stay in memory beside them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer

HUGE = 1 << 21
READ_AHEAD = 1 << 17  # bytes of a file that Linux, as it is usually set, reads for one request


class ReadAll(ctypes.Structure):
    _fields_ = [
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "ahead")),
        ("sum", ctypes.c_int64 * 64),
    ]


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


def let_go(tensors: Iterable[Tensor]) -> None:
    """Take tensors that lie in mapped files out of memory; what was taken comes back from the file when it is read.

    Only contiguous tensors, and of these the pages that no other tensor has a part of. The system says of each page
    whether it still is the file's own. One that was written to is not, nor is any other memory: whoever let go of those
    would find zeros or what the file holds. A tensor with a single such page stays as it is, and every one does where
    the system does not say.
    """
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb", buffering=0) as pages:
        madvise = ctypes.CDLL(None).madvise
        for tensor in tensors:
            first = -(-tensor.data_ptr() // mmap.PAGESIZE)
            count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
            if count <= 0 or not tensor.is_contiguous():
                continue
            if files_own(os.pread(pages.fileno(), 8 * count, 8 * first), count):
                begin, size = (ctypes.c_size_t(number * mmap.PAGESIZE) for number in (first, count))
                madvise(begin, size, mmap.MADV_DONTNEED)


def ask_for(tensor: Tensor) -> None:
    """Have the system read a tensor that lies in a mapped file, as far as there is room. It may drop it again.

    Without that, rows that are used one at a time would each wait for the disk.
    """
    if sys.platform == "linux":
        madvise, end = ctypes.CDLL(None).madvise, tensor.data_ptr() + tensor.nbytes
        for begin in range(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, READ_AHEAD):
            size = min(READ_AHEAD, end - begin)
            madvise(ctypes.c_size_t(begin), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def files_own(entries: bytes, count: int) -> bool:
    """Whether each of so many pages is a file's or is not there. entries: as pagemap.rst of the Linux kernel has them,
    where bit 61 means a file's, 62 swapped out and 63 in memory."""
    if len(entries) != 8 * count:
        return False
    page = torch.frombuffer(bytearray(entries), dtype=torch.int64) >> 61 & 7
    return bool(((page & 1 == 1) | (page == 0)).all())


def read_speed(memory: Tensor) -> float:
    """Bytes a second at which torch's number of threads read this memory, once as it comes and once fetching ahead, the
    better of both: which that is changes with the machine and, on shared ones, with the minute. Native only."""
    seconds = []
    for ahead in (0, 8192):
        begin = time.perf_counter()
        call("nautilus_read_all", ReadAll(pointer(memory), memory.nbytes // 8, ahead))
        seconds.append(time.perf_counter() - begin)
    return memory.nbytes / min(seconds)
