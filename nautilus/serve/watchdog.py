"""Whether a step of an engine hangs, and where."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator

log = logging.getLogger("nautilus.serve")
LOOKS = 4  # times in a limit, and at least once a second


class Watchdog:
    """Told of every step. limit: seconds after which one counts as overdue."""

    def __init__(self, limit: float):
        self.limit = limit
        self.began: float | None = None  # the step that runs now, if any

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.began = time.monotonic()
        try:
            yield
        finally:
            self.began = None

    @property
    def overdue(self) -> bool:
        began = self.began
        return began is not None and time.monotonic() - began > self.limit

    async def look(self) -> None:
        """For ever: the log gets the stacks of all threads, once for each overdue step, and word of its end."""
        told: float | None = None
        while True:
            await asyncio.sleep(min(1.0, self.limit / LOOKS))
            if told is not None and self.began != told:
                log.error("the step that took too long has ended")
                told = None
            if told is None and self.overdue:
                told = self.began
                log.error("a step has taken more than %g seconds; where all threads are:\n%s", self.limit, stacks())


def stacks() -> str:
    """Of all threads, the newest call last. Lines of code only, no values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    each = (
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
    return "\n".join(each)
