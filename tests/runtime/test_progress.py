import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.runtime import Progress, UserError, read_metrics
from nautilus.runtime.progress import clock_time


def follow(path, steps, total=10, start=0, **extra):
    with Progress(path, total, start) as progress:
        for step in steps:
            progress({"step": step, "loss": 1.0 / (1 + step)} | extra)


@given(
    reached=st.integers(0, 9),
    start=st.integers(0, 9),
    torn=st.sampled_from(["", "{", "3", '{"step": 3, "lo', "\x00\x00", '{"step": "3"}', "{}", "[" * 100_000]),
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


@pytest.mark.parametrize(
    "row", ["[1]", "{}", '{"step": "1"}', '{"step": true}', '{"step": -1}', '{"step": 1e400}', "[" * 9999]
)
def test_a_line_in_the_middle_that_is_no_row_is_named_and_nothing_is_lost(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before := f'{{"step": 0}}\n{row}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is no row of metrics: .*; remove that line") as caught:
        follow(path, range(3, 5), start=3)
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    assert path.read_text() == before and len(str(caught.value)) < 400


def test_a_folder_in_place_of_the_file_is_one_message(tmp_path):
    with pytest.raises(UserError, match="cannot write .*Is a directory"):
        follow(tmp_path, range(1))


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


def test_what_is_not_counted_is_in_neither_rate_nor_time_left(tmp_path):
    now = iter([100.0, 101.0, 131.0, 135.0])
    with Progress(tmp_path / "m", 10, unit="turn", clock=lambda: next(now)) as progress:
        with pytest.raises(KeyError), progress.uncounted():
            raise KeyError
        assert progress.describe(1, {"step": 0}) == "1/10  5 s/turn  0:45 left"


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
    assert clock_time(seconds) == text


def test_work_goes_on_when_the_reader_of_stderr_is_gone(tmp_path):
    script = textwrap.dedent("""
        import sys
        from nautilus.runtime import Progress
        sys.stdin.readline()
        with Progress(sys.argv[1], 3) as progress:
            for step in range(3):
                progress({"step": step, "loss": 1.5})
                progress.say("a line for nobody")
        print("the end")
    """)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, str(tmp_path / "m")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        child.stderr.close()
        assert child.communicate("go\n")[0] == "the end\n" and child.returncode == 0
    assert len(read_metrics(tmp_path / "m")) == 3
