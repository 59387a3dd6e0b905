"""Work beside the training: one call at a time, in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import torch

log = logging.getLogger("nautilus.train")


class Beside:
    """At most one call is under way. Whoever begins one must `wait` for it; only there its error is raised.

    The thread ends with the process: who leaves without waiting leaves the work undone.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    def begin(self, work: Callable[[], object]) -> None:
        """Waits for the call before, raising its error, and starts this one."""
        self.wait()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            try:
                if gpu is not None:
                    torch.cuda.set_device(gpu)  # each thread has a current device of its own, at first GPU 0
                work()
            except BaseException as bad:
                self.error = bad

        self.thread = threading.Thread(target=run, name="beside the training", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Returns when nothing is under way; raises what the last call raised, once."""
        if self.thread is not None:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is still to be written before an error is raised does not hide it behind an error of its own."""
        try:
            yield
        except Exception as bad:
            log.warning("the last state could not be saved either: %s", bad)
