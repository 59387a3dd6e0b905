import errno
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus import runtime
from nautilus.runtime import Progress, Run, UserError, atomic_folder, is_run, read_metrics, repair, write_atomic


def everything_in(folder: pathlib.Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def save(path: pathlib.Path, text: str) -> None:
    with atomic_folder(path) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "weights").write_text(text)
        (fresh / "deep" / "more").write_text(text)


# ----- folders and files ---------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        Run.create(tmp_path / "run", {})


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model"):
        (tmp_path / "nothing here").read_text()


# ----- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_is_created_opened_and_told_from_a_checkpoint_folder(tmp_path):
    run = Run.create(tmp_path / "deep" / "run", {"steps": 3, "layers": ["M", "E"]})
    assert is_run(run.folder) and Run.open(run.folder).settings == {"steps": 3, "layers": ["M", "E"]}
    assert (run.model, run.metrics) == (run.folder / "model", run.folder / "metrics.jsonl")
    save(run.model, "weights")
    write_atomic(run.model / "config.json", json.dumps({"model_type": "nemotron_h"}))
    assert not is_run(run.model) and not is_run(tmp_path / "nothing") and not is_run(run.config)


def test_a_new_run_does_not_overwrite_what_is_there(tmp_path):
    Run.create(tmp_path / "run", {"a": 1})
    with pytest.raises(UserError, match="already holds config.json; choose another folder"):
        Run.create(tmp_path / "run", {"a": 2})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file"):
        Run.create(tmp_path / "file", {})
    assert Run.open(tmp_path / "run").settings == {"a": 1}


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="no run in .*check the path"):
        Run.open(tmp_path)


def test_opening_a_run_puts_back_what_a_killed_save_left(tmp_path):
    run = Run.create(tmp_path / "run", {})
    for path in (run.model, run.state):
        save(path, "old")
        path.rename(runtime.old_name(path))
        path.with_name(f".{path.name}.tmp-1").mkdir()
    Run.open(run.folder)
    kept = everything_in(run.folder)
    assert kept.pop("config.json") and set(kept.values()) == {"old"} and len(kept) == 4
    assert not list(run.folder.glob(".*"))


# ----- progress ------------------------------------------------------------------------------------------------------


def follow(path, steps, total=10, start=0, **extra):
    with Progress(path, total, start) as progress:
        for step in steps:
            progress({"step": step, "loss": 1.0 / (1 + step)} | extra)


@given(
    reached=st.integers(0, 9),
    start=st.integers(0, 9),
    torn=st.sampled_from(["", "{", "3", '{"step": 3, "lo', "\x00\x00"]),
)
def test_no_step_occurs_twice_after_resuming(tmp_path_factory, reached, start, torn):
    start = min(start, reached)
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    follow(path, range(reached))
    with open(path, "a") as file:
        file.write(torn)
    follow(path, range(start, 10), start=start)
    assert [row["step"] for row in read_metrics(path)] == list(range(10))


def test_a_row_whose_line_end_was_lost_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    follow(path, range(2, 4), start=2)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]


def test_rows_are_strict_json_and_reach_the_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Progress(path, 2) as progress:
        progress({"step": 0, "loss": float("nan"), "load": [1, float("inf")], "deep": {"a": float("-inf")}})
        text = path.read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert row == {"step": 0, "loss": None, "load": [1, None], "deep": {"a": None}}


def test_without_a_terminal_a_plain_line_is_printed_now_and_then(tmp_path, capsys):
    now = iter(range(1000))
    with Progress(tmp_path / "m", 40, shown=("loss",), clock=lambda: next(now)) as progress:
        for step in range(40):
            progress({"step": step, "loss": 2.5, "other": 7.0})
    lines = capsys.readouterr().err.splitlines()
    assert 3 < len(lines) < 20
    assert lines[0].startswith("1/40  loss 2.5  ") and "other" not in lines[0]
    assert lines[-1].startswith("40/40") and lines[-1].endswith("0:00 left")


def test_rate_and_time_left_count_only_the_steps_of_this_start(tmp_path):
    now = iter([100.0, 104.0])
    with Progress(tmp_path / "m", 10, 6, clock=lambda: next(now)) as progress:
        assert progress.describe(8, {"step": 7, "loss": 3.0}) == "8/10  loss 3  2 s/step  0:04 left"


def test_a_terminal_shows_one_live_line(tmp_path):
    script = textwrap.dedent("""
        import pty, sys, os
        from nautilus.runtime import Progress
        with Progress(sys.argv[1], 3) as progress:
            for step in range(3):
                progress({"step": step, "loss": 1.5})
            progress.say("a line that stays")
    """)
    master, slave = os.openpty()
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "m")], stderr=slave, stdout=slave) as child:
        child.wait()
        os.close(slave)
        shown = os.read(master, 100_000).decode()
        os.close(master)
    assert child.returncode == 0, shown
    assert "3/3  loss 1.5" in shown and "a line that stays" in shown


@pytest.mark.parametrize("seconds,text", [(0.4, "0:00"), (42, "0:42"), (723, "12:03"), (11275, "3:07:55")])
def test_times_are_written_as_clocks_show_them(seconds, text):
    assert runtime.clock_time(seconds) == text
