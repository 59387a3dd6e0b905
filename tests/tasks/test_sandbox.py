"""What a program can do in the sandbox, and what it cannot. Skipped only where bubblewrap is not installed, which
`.ci/run` sees to where it can."""

import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nautilus.tasks import GraderBroken
from nautilus.tasks.sandbox import USERS, Bounds, available, own_user, run_python

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def test_there_is_one():
    assert available() == ""


def test_a_sandbox_that_fails_is_no_fault_of_the_program(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(GraderBroken, match="no sandbox could be made.*no namespaces here"):
        run_python("print(1)")
    monkeypatch.undo()
    assert run_python("import sys; sys.exit('bwrap: no sandbox')").code == 1  # a program cannot feign it


def test_a_program_reads_and_prints_and_has_files():
    ran = run_python("print(input(), open('more.txt').read(), end='')", given="so\n", files={"more.txt": "much"})
    assert (ran.code, ran.out, ran.err) == (0, "so much", "")
    assert run_python("import math, json, numpy").code in (0, 1)
    assert run_python("import sys; sys.exit(7)").code == 7
    with pytest.raises(ValueError, match="plain name"):
        run_python("", files={"../x": ""})


@pytest.mark.parametrize(
    "program",
    [
        "open('x', 'w')", "open('/usr/x', 'w')", "open('/etc/passwd').read()", "open('/etc/shadow').read()",
        "import os; os.mkdir('/x/y')", f"open({str(Path(__file__))!r}).read()",
        "import os; os.listdir(os.path.expanduser('~root'))",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 2)", "import os; os.kill(PID, 0)",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import ctypes; assert ctypes.CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, None) == 0",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "import os; assert 'HOME' in os.environ",
    ],
)  # fmt: skip
def test_what_it_must_not_do_fails(program):
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        ran = run_python(program.replace("PORT", str(server.server_port)).replace("PID", str(os.getpid())))
    finally:
        server.shutdown()
        server.server_close()
    assert ran.code not in (0, None), ran
    assert "rror" in ran.err, ran


def test_what_is_too_much_ends():
    begin = time.monotonic()
    assert run_python("while True: pass", bounds=Bounds(seconds=1)).code is None
    assert run_python("import time; time.sleep(60)", bounds=Bounds(seconds=1)).code is None
    assert run_python("while True: pass", bounds=Bounds(cpu=1)).code not in (0, None)
    assert "MemoryError" in run_python("x = bytearray(1 << 29)", bounds=Bounds(memory=1 << 28)).err
    printed = run_python("while True: print('x' * 1000)", bounds=Bounds(file=1 << 16))
    assert printed.code not in (0, None) and len(printed.out) <= 1 << 16
    assert time.monotonic() - begin < 60


@pytest.mark.skipif(os.geteuid() == 0 and not own_user(), reason="the kernel holds root to no number of processes")
def test_too_many_processes_are_not_started():
    """No bomb itself: 40 at most, of 16 that are allowed, for a second."""
    program = (
        "import os, time\n"
        "for _ in range(40):\n"
        "    if os.fork() == 0: time.sleep(1); os._exit(0)\n"
        "    print('one', flush=True)"
    )  # fmt: skip
    ran = run_python(program, bounds=Bounds(processes=16))
    assert ran.code == 1 and "BlockingIOError" in ran.err and ran.out.count("one") < 16


@pytest.mark.skipif(not own_user(), reason="only what root runs becomes another")
def test_what_root_runs_is_not_root_and_may_write_where_it_may():
    program = (
        "import os, multiprocessing\n"
        "open('/tmp/own', 'w').close()\n"
        "multiprocessing.Lock()\n"  # in /dev/shm
        "rights = open('/proc/self/status').read().split('CapEff:')[1].split()[0]\n"
        "print(os.getuid(), os.getgid(), os.getgroups(), rights)"
    )  # fmt: skip
    users = {tuple(run_python(program).out.split()) for _ in range(3)}
    assert {int(user) in USERS and user == group for user, group, _, _ in users} == {True}
    assert {(groups, int(rights, 16)) for *_, groups, rights in users} == {("[]", 0)}


def test_where_root_may_not_become_another_it_is_root_of_a_namespace(monkeypatch):
    monkeypatch.setattr("nautilus.tasks.sandbox.own_user", lambda: 0)
    assert run_python("open('/tmp/own', 'w').write('x'); print('so')").out == "so\n"


def test_what_it_starts_ends_with_it(tmp_path):
    program = (
        "import subprocess, sys\n"
        "for _ in range(3): subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600.125)'])"
    )
    assert run_python(program).code == 0
    run_python(program + "\nimport time; time.sleep(60)", bounds=Bounds(seconds=1))
    until = time.monotonic() + 10
    while left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if sleeps(path)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def sleeps(path: Path) -> bool:
    try:
        return b"600.125" in path.read_bytes()
    except OSError:
        return False
