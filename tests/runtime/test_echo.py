import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from nautilus.runtime import quiet

SCRIPT = """
import contextlib, fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from nautilus.runtime import quiet
shown = lambda: print(bool(termios.tcgetattr(0)[3] & termios.ECHO), flush=True)
shown()
with contextlib.suppress(KeyError), quiet():
    shown()
    raise KeyError
shown()
with contextlib.suppress(SystemExit), quiet():
    os.kill(os.getpid(), signal.SIGTERM)
shown()
with quiet():
    os.kill(os.getpid(), signal.SIGTERM)
"""


def run(script, **streams):
    """What a program with a terminal of its own writes there, and its status."""
    ours, theirs = os.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs} | streams
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True, **streams) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # what Linux says once the other side is closed
            while part := os.read(ours, 9999):
                shown += part
    os.close(ours)
    return shown.decode().split(), child.returncode


def test_a_terminal_is_silent_inside_and_put_back_however_the_block_ends():
    assert run(SCRIPT) == (["True", "False", "True", "True"], 128 + signal.SIGTERM)


def test_a_terminal_whose_other_side_is_a_pipe_stays_as_it_is(tmp_path: pathlib.Path):
    script = SCRIPT.partition("shown()\nwith contextlib.suppress(SystemExit)")[0]
    with open(tmp_path / "out", "w") as file:
        assert run(script, stdout=file) == ([], 0)
    assert (tmp_path / "out").read_text().split() == ["True", "True"]


def test_without_a_terminal_nothing_happens():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), quiet():
        assert signal.getsignal(signal.SIGTERM) is before
        raise KeyError
