"""Programs that nobody has read, run where they can do no harm: no network, no files but their own, bounded in all.

`bwrap` (bubblewrap) gives a program namespaces of its own: it sees a plain Python, read-only, an empty /tmp and its own
files. It has no network, no other process, and no rights that it could use outside. Within, limits hold for its time,
memory, files and processes. Without bubblewrap nothing is run: limits alone keep nobody in.

The kernel holds root to no number of processes. What root runs becomes a user of its own, which needs the namespaces of
the machine's users; where root may not do that, it stays root of a namespace, without that one limit.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nautilus.tasks.task import GraderBroken

SHOWN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives")  # of the machine, read-only
PYTHON = os.path.realpath(sys.executable)
HOME = "/program"  # where its files are
USERS = range(61184, 65520)  # that are nobody's: systemd gives them to services for as long as they run
SETGID, SETUID, SYS_ADMIN = 6, 7, 21  # numbers of capabilities(7)
ROOM = str(1 << 26)  # bytes
# Runs inside, before the program does: what it starts inherits the limits and cannot raise them. It says that it is
# there, which the program itself cannot: by that a sandbox that failed is told from a program that did.
LIMITED = """
import os, resource, sys
said, user, cpu, memory, file, processes = map(int, sys.argv[1:7])
for name, most in (("CPU", cpu), ("AS", memory), ("FSIZE", file), ("NPROC", processes), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    open(sys.executable, "rb").close()
os.write(said, b"1")
os.close(said)
os.execv(sys.executable, [sys.executable, "-I", *sys.argv[7:]])
"""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """seconds: by the clock; cpu: of all threads; memory: bytes of a process; file: bytes of a file, and of what is
    printed; processes: of the user that runs it, threads included."""

    seconds: float = 10.0
    cpu: int = 10
    memory: int = 1 << 30
    file: int = 1 << 24
    processes: int = 64


@dataclass(frozen=True, kw_only=True)
class Ran:
    """code: of its exit, negative for a signal; None where it took too long."""

    code: int | None
    out: str
    err: str


def available() -> str:
    """Why no program can be run here; "" if it can."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "the sandbox needs the program bwrap; install the package bubblewrap"
    return ""


def own_user() -> int:
    """That a program becomes in its jail; 0: it stays who it is."""
    if os.geteuid() != 0:
        return 0
    mine = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    able = mine is not None and all(int(mine[1], 16) >> right & 1 for right in (SETGID, SETUID, SYS_ADMIN))
    return random.SystemRandom().choice(USERS) if able else 0


def jail(user: int, *more: str) -> list[str]:
    """A command line that what is to be run is added to."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [path for path in (*SHOWN, prefix) if Path(path).exists()]
    shown = [part for path in paths if path in SHOWN or not path.startswith(SHOWN) for part in bound(path)]
    apart = ["ipc", "pid", "net", "uts", "cgroup-try"] if user else ["all"]
    written = ["--size", ROOM, *(["--perms", "1777"] if user else []), "--tmpfs"]
    # What bubblewrap makes on the way to a folder is closed to others.
    way = [*reversed(Path(prefix).parents)][1:] if user else []
    return [
        "bwrap", *(f"--unshare-{name}" for name in apart), "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        *(["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if user else []), "--clearenv", "--proc", "/proc",
        "--dev", "/dev", *written, "/dev/shm", *written, "/tmp",
        *(part for folder in way for part in ("--perms", "0711", "--dir", str(folder))), *shown, *more,
    ]  # fmt: skip


def bound(path: str) -> list[str]:
    """A folder of the machine as it is there: a link stays one."""
    return ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]


def run_python(
    source: str, *, given: str = "", files: Mapping[str, str] | None = None, bounds: Bounds = Bounds()
) -> Ran:
    """Runs a program; given: what it reads from stdin; files: by name, beside it. GraderBroken without a sandbox."""
    if why := available():
        raise GraderBroken(f"a program was to be run, but {why}")
    with tempfile.TemporaryDirectory() as place:
        inside = Path(place) / "files"
        inside.mkdir()
        inside.chmod(0o755)
        for name, text in {"main.py": source, **(files or {})}.items():
            if Path(name).name != name:
                raise ValueError(f"a file {name!r} was asked for beside the program; give a plain name")
            (inside / name).write_text(text)
            (inside / name).chmod(0o644)
        (Path(place) / "given").write_text(given)
        return waited(Path(place), inside, bounds)


def waited(place: Path, inside: Path, bounds: Bounds) -> Ran:
    """What it prints goes to files, whose size is bounded; a pipe would be read into memory."""
    listening, said = os.pipe()
    user = own_user()
    limits = [str(most) for most in (said, user, bounds.cpu, bounds.memory, bounds.file, bounds.processes)]
    where = jail(user, "--ro-bind", str(inside), HOME, "--chdir", HOME)
    command = [*where, PYTHON, "-I", "-c", LIMITED, *limits, f"{HOME}/main.py"]
    try:
        with (place / "given").open() as stdin, (place / "out").open("wb") as out, (place / "err").open("wb") as err:
            running = subprocess.Popen(
                command, stdin=stdin, stdout=out, stderr=err, start_new_session=True, pass_fds=[said]
            )
        os.close(said)
        code = ended(running, bounds.seconds)
        begun = os.read(listening, 1)
    finally:
        os.close(listening)
    told = [(place / name).read_bytes()[: bounds.file].decode(errors="replace") for name in ("out", "err")]
    if not begun:
        raise GraderBroken(f"no sandbox could be made to run a program in: {told[1].strip()[-300:]}")
    return Ran(code=code, out=told[0], err=told[1])


def ended(running: subprocess.Popen, seconds: float) -> int | None:
    """Its exit code, None where it took longer; whatever it has started is over."""
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
