"""A computation that is made again and again on the same memory.

The first run computes, the second is recorded, later ones are replays where all of it is native. A replay has just read
all weights, so nothing of Python is in the cache any more and every object it touches waits for memory: what runs at
every step is as little as can be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nautilus.ops.cpu.tape import Tape, record

log = logging.getLogger("nautilus.serve")


class Recorded:
    """inputs: tensors that the caller writes before a run. What it gives lies in the same memory every time."""

    def __init__(self, compute: Callable[[], Any], inputs: Sequence[Tensor]):
        self.compute, self.inputs = compute, inputs
        self.tape: Tape | None = None
        self.may_record = inputs[0].device.type == "cpu"
        self.warm = False

    def run(self) -> Any:
        if self.tape is not None:
            return self.tape.replay()
        if not (self.warm and self.may_record):
            self.warm = True
            return self.compute()
        tape = record(self.compute, self.inputs)
        if tape.broken:
            log.info("steps are not replayed, because %s", tape.broken)
            self.may_record = False
        else:
            self.tape = tape
        return tape.result
