"""The native library: found, checked, and told which instruction level and which threads to use.

NAUTILUS_NATIVE chooses: `off` for none, or the name of a level below the best one: avx512, avx2 and baseline on x86,
neon_dot, neon and baseline on ARM.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

log = logging.getLogger("nautilus.ops")
INTERFACE = 23
HARD = 2  # omp_pause_hard of OpenMP 5.0
CROWDED = "a tentative call has more tokens of a row than slots can keep; draft fewer, or give slots a larger window"
UNDECIDED = "tokens of an earlier tentative call wait; before the next call say how many of them stay, 0 or more"
FILE = Path(__file__).with_name("libnautilus.so")


@dataclass(frozen=True, kw_only=True)
class Native:
    """`functions` is None where there is no native path; `reason` then says why, and otherwise which level runs."""

    functions: ctypes.CDLL | None
    level: str
    reason: str


@functools.cache
def native() -> Native:
    wanted = os.environ.get("NAUTILUS_NATIVE", "")
    if wanted == "off":
        return Native(functions=None, level="", reason="NAUTILUS_NATIVE=off")
    if not FILE.exists():
        return absent("the native library was not built: install a C++17 compiler, then install nautilus again")
    seal = FILE.with_suffix(".sha256")
    try:
        wanted_sum = seal.read_bytes().strip() if seal.exists() else b""
        if wanted_sum != hashlib.sha256(FILE.read_bytes()).hexdigest().encode():
            return absent(f"{FILE.name} is not what was built (its checksum differs); install nautilus again")
        functions = ctypes.CDLL(str(FILE))
        found = functions.nautilus_interface()
    except (OSError, AttributeError) as error:
        return absent(f"the native library cannot be used ({error}); install nautilus again")
    if found != INTERFACE:
        return absent(
            f"the native library has interface {found}, this version needs {INTERFACE}; install nautilus again"
        )
    return choose_level(functions, wanted)


def absent(reason: str) -> Native:
    """Said once, out loud: nobody should run slowly without knowing why."""
    log.warning("the torch implementations run, because %s", reason)
    return Native(functions=None, level="", reason=reason)


def choose_level(functions: ctypes.CDLL, wanted: str) -> Native:
    functions.nautilus_level_name.restype = ctypes.c_char_p
    functions.nautilus_linear_packed_size.restype = ctypes.c_int64
    functions.nautilus_quant_sizes.restype = ctypes.c_int64
    names: list[str] = []
    while (name := functions.nautilus_level_name(len(names))) is not None:
        names.append(name.decode())
    here = [name for index, name in enumerate(names) if functions.nautilus_level_is_here(index)]
    if wanted and wanted not in here:
        raise ValueError(f"NAUTILUS_NATIVE={wanted!r} is no level of this machine; choose off, {' or '.join(here)}")
    level = wanted or here[0]
    functions.nautilus_choose(names.index(level))
    functions.nautilus_borrow_team.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    functions.nautilus_borrow_team(*team_of_torch())
    return Native(functions=functions, level=level, reason=f"level {level}")


def team_of_torch() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_thread_num in the OpenMP library that torch runs on, if it is libgomp.

    Two teams of threads would fight over the cores, because idle OpenMP threads spin before they sleep.
    """
    team = openmp_of_torch()
    if team is None:
        return None, None
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in (team.GOMP_parallel, team.omp_get_thread_num))  # type: ignore[return-value]


def openmp_of_torch() -> ctypes.CDLL | None:
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else []:
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libgomp"):
            return ctypes.CDLL(path)
    return None


def leave_computing() -> None:
    """Ends the OpenMP threads that work for the calling thread, because another thread computes from now on.

    Every thread that computes has such a team. Where all teams together have more threads than there are cores, libgomp
    puts idle ones to sleep at once instead of letting them spin, and a step of a small model takes four times as long.
    """
    if (team := openmp_of_torch()) is not None:
        team.omp_pause_resource_all(HARD)


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why native kernels cannot take these tensors; None when they can."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"a tensor is {tensor.dtype}"
    return None if native().functions is not None else native().reason


class Tape(Protocol):
    """Who wants to know of every native call and of the memory it touches; see `tape.py`."""

    def touch(self, tensor: torch.Tensor) -> None: ...

    def add(self, name: str, arguments: ctypes.Structure) -> None: ...


recording: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("recording", default=None)


def pointer(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    if (tape := recording.get()) is not None:
        tape.touch(tensor)
    return tensor.data_ptr()


def call(name: str, arguments: ctypes.Structure) -> None:
    """Runs one kernel on torch's number of threads."""
    functions = native().functions
    assert functions is not None
    check(name, functions[name](ctypes.byref(arguments), torch.get_num_threads()))
    if (tape := recording.get()) is not None:
        tape.add(name, arguments)


def check(name: str, failure: int) -> None:
    if failure == 1:
        raise MemoryError(f"{name}: no memory for its scratch; use fewer rows at a time")
    if failure == 3:
        raise RuntimeError(f"{name}: {UNDECIDED}")
    if failure == 4:
        raise ValueError(f"{name}: {CROWDED}")
    if failure:
        raise IndexError(f"{name}: an index lies outside the matrix it chooses from")
