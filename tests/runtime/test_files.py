import errno
import os
import pathlib
import resource
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.runtime import (
    Progress,
    Run,
    UserError,
    atomic_folder,
    json_lines,
    read_json,
    read_metrics,
    repair,
    write_atomic,
)


def everything_in(folder: pathlib.Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def save(path: pathlib.Path, text: str) -> None:
    with atomic_folder(path) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "weights").write_text(text)
        (fresh / "deep" / "more").write_text(text)


# ----- whole or not at all --------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    save(tmp_path / "model", "one")
    (tmp_path / "model" / "of the old one only").touch()
    save(tmp_path / "model", "two")
    assert everything_in(tmp_path) == {"model/weights": "two", "model/deep/more": "two"}


def test_a_block_that_fails_changes_nothing(tmp_path):
    save(tmp_path / "model", "one")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model") as fresh:
        (fresh / "weights").write_text("half of")
        _ = 1 / 0
    assert everything_in(tmp_path) == {"model/weights": "one", "model/deep/more": "one"}


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    save(tmp_path / "elsewhere", "one")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "model", "two")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "elsewhere" / "weights").read_text() == "two"


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with atomic_folder(tmp_path / "model") as fresh:
        (fresh / "weights").write_text("one")
        with pytest.raises(UserError, match="another process is writing"), atomic_folder(tmp_path / "model"):
            pass
        assert not repair(tmp_path / "model")
    assert everything_in(tmp_path) == {"model/weights": "one"}


# In a process of its own, which forks a child for each moment: the child kills itself at its k-th dealing with the
# folder, as counted by Python's own audit events (open, mkdir, rename, remove, rmdir, rmtree).
KILLED_EVERYWHERE = """
    import os, pathlib, signal, sys
    from nautilus.runtime import atomic_folder, repair
    here = pathlib.Path(sys.argv[1])
    path = here / "model"

    def save(text):
        with atomic_folder(path) as fresh:
            (fresh / "weights").write_text(text)
            (fresh / "more").write_text(text)

    def child(moment):
        seen = 0
        def hook(event, args):
            nonlocal seen
            if event.split(".")[0] in ("open", "os", "shutil") and args and str(here) in str(args[0]):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        save("new")
        os._exit(0)

    moment, outcomes = 0, []
    while True:
        moment += 1
        save("old")
        pid = os.fork()
        if pid == 0:
            child(moment)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
        assert repair(path)
        content = {(path / name).read_text() for name in ("weights", "more")}
        assert len(content) == 1, (moment, content)
        left = sorted(place.name for place in here.iterdir())
        assert left == ["model"], (moment, left)
        outcomes += content
        if not killed:
            break
    print(moment, outcomes.count("old"), outcomes.count("new"))
"""


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    script = textwrap.dedent(KILLED_EVERYWHERE)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments, old, new = map(int, done.stdout.split())
    assert moments > 8 and old > 4 and new > 1


def test_a_reader_does_not_disturb_a_save_under_way(tmp_path):
    run = Run.create(tmp_path / "run", {})
    save(run.model, "old")
    with atomic_folder(run.model) as fresh:
        (fresh / "weights").write_text("new")
        assert (Run.open(tmp_path / "run").model / "weights").read_text() == "old"
    assert (run.model / "weights").read_text() == "new"


@given(old=st.binary(max_size=50), new=st.binary(max_size=50))
def test_a_file_is_replaced_as_a_whole(tmp_path_factory, old, new):
    path = tmp_path_factory.mktemp("files") / "file"
    write_atomic(path, old)
    write_atomic(path, new)
    assert path.read_bytes() == new
    assert [place.name for place in path.parent.iterdir()] == ["file"]


# ----- a disk that is full or refuses --------------------------------------------------------------------------------


def full(*args, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_disk_that_fills_up_during_a_save_leaves_the_old_folder(tmp_path, monkeypatch, moment):
    save(tmp_path / "model", "old")
    write_atomic(tmp_path / "file", "old")
    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match="disk is full"):
                write_atomic(tmp_path / "file", "new")
        else:
            patch.setattr(pathlib.Path, "rename", full)
        with pytest.raises(UserError, match="cannot write .*model.*MB free.*free some space.*untouched"):
            save(tmp_path / "model", "new")
    assert everything_in(tmp_path) == {"file": "old", "model/weights": "old", "model/deep/more": "old"}


def test_an_error_between_the_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    save(tmp_path / "model", "old")
    rename = pathlib.Path.rename

    def second_fails(source, target):
        if ".tmp-" in source.name:
            full()
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", second_fails)
        with pytest.raises(UserError, match="disk is full"):
            save(tmp_path / "model", "new")
    assert everything_in(tmp_path) == {"model/weights": "old", "model/deep/more": "old"}


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a real small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_leaves_the_old_folder_and_the_metrics(tiny_disk):
    run = Run.create(tiny_disk / "run", {})
    save(run.model, "old")
    with pytest.raises(UserError, match="disk is full"):
        save(run.model, "new" * 100_000)
    assert (run.model / "weights").read_text() == "old"
    with pytest.raises(UserError, match="disk is full"), Progress(run.metrics, 100_000) as progress:
        for step in range(100_000):
            progress({"step": step, "loss": 1.0})
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > 100


def test_an_unwritable_folder_is_an_error_that_says_so(tmp_path, monkeypatch):
    def refuse(*args, **named):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write .*Permission denied.*choose a folder"):
        Run.create(tmp_path / "run", {})
    with pytest.raises(UserError, match="cannot write .*Permission denied.*choose a folder"):
        save(tmp_path / "model", "new")


@pytest.fixture
def nobody():
    """Root may write anywhere, so it acts as a user without rights meanwhile."""
    us = os.geteuid()
    if us == 0:
        os.seteuid(65534)
    yield
    os.seteuid(us)


def test_a_folder_without_write_permission_is_refused(tmp_path, nobody):
    if os.geteuid() != 65534:
        tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write .*run: Permission denied .*choose a folder"):
        Run.create(tmp_path / "run", {})


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model"):
        (tmp_path / "nothing here").read_text()


# ----- JSON files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content,message",
    [
        ("", "is not valid JSON"),
        ('{"a": [1, 2', "is not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[]", "holds list, not an object"),
        ("null", "holds NoneType, not an object"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "is nested more than 64 levels deep"),
        ('{"a": ' * 65 + "1" + "}" * 65, "is nested more than 64 levels deep"),
        ("\udcff{}", "cannot read .*can't decode byte 0xff"),
    ],
)
def test_a_file_that_holds_no_json_object_is_named_with_what_to_do(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=f"a.json.*{message}.*; do this" if "cannot" not in message else message):
        read_json(tmp_path / "a.json", "do this")


def test_a_file_larger_than_any_such_file_is_not_read(tmp_path):
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 1 << 36)
    with pytest.raises(UserError, match=f"a.json has {1 << 36:,} bytes, .*; do this"):
        read_json(tmp_path / "a.json", "do this")


def test_a_file_as_deep_as_allowed_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"é": ' + "[" * 63 + "]" * 63 + "}")
    assert list(read_json(tmp_path / "a.json")) == ["é"]


@pytest.mark.timeout(30)
def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"gone": "no gone; do this", "pipe": "no pipe that is a file", ".": "that is a file"}.items():
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name, "do this")


def test_a_file_larger_than_may_be_is_an_error_that_says_so_and_leaves_the_old_one(tmp_path):
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_atomic(path, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*ulimit -f.*saved before is untouched"):
            write_atomic(path, b"x" * (1 << 21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and [place.name for place in tmp_path.iterdir()] == ["file"]


# ----- JSON lines -----------------------------------------------------------------------------------------------------


def test_rows_come_with_the_numbers_of_their_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"a": "é"}\n\n{"b": 2}'.encode())
    assert [*json_lines(tmp_path / "rows.jsonl")] == [(1, {"a": "é"}), (3, {"b": 2})]


@pytest.mark.parametrize(
    "line, why",
    [
        (b'{"a": "\xe9"}', "no JSON in UTF-8"), (b"{", "no JSON"), (b"[1]", "no object, but"), (b"3", "no object"),
        (b"[" * 100_000, "no JSON"),
    ],
)  # fmt: skip
def test_what_is_no_row_is_named_by_file_and_line(tmp_path, line, why):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"rows.jsonl, line 2, is {why}"):
        [*json_lines(tmp_path / "rows.jsonl")]


def test_a_file_of_rows_that_is_not_there_or_no_file(tmp_path):
    for place, why in (("nowhere", "is not there"), ("", "is no file")):
        with pytest.raises(UserError, match=why):
            [*json_lines(tmp_path / place)]
