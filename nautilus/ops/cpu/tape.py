"""A computation recorded as the native calls it made, to be run again as one.

Between two kernels Python and PyTorch cost more than many a kernel does. A step of generation makes the same calls on
the same memory every time; so it is recorded once, with inputs and outputs that stay where they are, and then only
replayed. What changes from step to step (tokens, lengths, tables, states) changes in that memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nautilus.ops.cpu.library import check, native, recording

# Ops that look at a tensor's shape and type only.
METADATA = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach", "alias")


class Entry(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p)]


class Replay(ctypes.Structure):
    _fields_ = [("entries", ctypes.c_void_p), ("count", ctypes.c_int64), ("failed", ctypes.c_int64)]


class Tape:
    """Native calls in order. It keeps the memory that they touch, `result` included. broken: what PyTorch computed in
    between, if anything: a replay would not repeat that, so there can be none."""

    def __init__(self):
        self.names: list[str] = []
        self.arguments: list[ctypes.Structure] = []
        self.memory: dict[int, Tensor] = {}  # by the address of its storage
        self.result: Any = None
        self.broken = ""
        self.program: Replay | None = None
        self.entries: ctypes.Array | None = None

    def touch(self, tensor: Tensor) -> None:
        self.memory |= dict.fromkeys(addresses(tensor), tensor)

    def add(self, name: str, arguments: ctypes.Structure) -> None:
        self.names.append(name)
        self.arguments.append(arguments)

    def replay(self) -> Any:
        """Does it all again and gives the same `result`, whose tensors have new contents."""
        functions = native().functions
        assert functions is not None
        if self.program is None:
            address = lambda name: ctypes.cast(functions[name], ctypes.c_void_p).value  # noqa: E731
            pairs = [(address(n), ctypes.addressof(a)) for n, a in zip(self.names, self.arguments, strict=True)]
            self.entries = (Entry * len(pairs))(*pairs)
            self.program = Replay(ctypes.addressof(self.entries), len(pairs), 0)
        failure = functions.nautilus_replay(ctypes.byref(self.program), torch.get_num_threads())
        if failure:
            check(self.names[self.program.failed], failure)
        return self.result


class Watch(TorchDispatchMode):
    """Looks for ops of PyTorch on what a native call has touched: their results would not be made again."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep the compiler out of this, which nobody compiles, PyTorch would first import it, for 3 seconds."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = addresses((args, kwargs)) & self.tape.memory.keys()
        # Some that may be views are copies for some inputs.
        moved = not func.is_view or not addresses(result) <= read
        if read and moved and func.overloadpacket.__name__ not in METADATA:
            self.tape.broken = self.tape.broken or f"{func} is computed by PyTorch, between native calls"
        return result


def addresses(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def record(function: Callable[[], Any], inputs: Sequence[Tensor] = ()) -> Tape:
    """Runs the function once, to its end: what it changes in memory is changed once, whether it can be replayed or not.
    The tape is broken where anything but native calls works on `inputs` or on what native calls made.

    What is to be done only once, packing a matrix for example, must have happened before.
    """
    tape = Tape()
    for tensor in inputs:
        tape.touch(tensor)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(Watch(tape))
        token = recording.set(tape)
        stack.callback(recording.reset, token)
        tape.result = function()
    return tape
