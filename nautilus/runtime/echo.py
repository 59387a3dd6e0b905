"""A terminal that does not show what is typed before it is read."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator

ECHO = 3  # the place of the local flags in what termios hands out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, what is typed is kept and not shown, until `input` reads and shows it. The terminal is put back however
    the block ends, also by SIGTERM; with a pipe on either side, and in the background, nothing is changed."""
    if not talking():
        yield
        return
    handle = sys.stdin.fileno()
    shown = termios.tcgetattr(handle)
    silent = [*shown]
    silent[ECHO] &= ~termios.ECHO
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        termios.tcsetattr(handle, termios.TCSANOW, silent)
        yield
    finally:
        if talking():  # else the shell has the terminal, and its own settings
            termios.tcsetattr(handle, termios.TCSANOW, shown)
        signal.signal(signal.SIGTERM, before)


def talking() -> bool:
    """Whether a terminal is on both sides and listens to this program."""
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # a terminal that is not the one this program was started from
        return False
