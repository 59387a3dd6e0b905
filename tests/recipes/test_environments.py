"""The command that puts tasks behind HTTP."""

import json
import os
import signal
import subprocess
import sys

import pytest

from nautilus.cli import main
from nautilus.recipes import environments
from nautilus.runtime import UserError
from nautilus.tasks import Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.pivot import reply_of


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "no task to put behind HTTP"),
        ("tasks=store:1,store:2", "names one twice"),
        ("tasks=walk", "there is no task 'walk'"),
        ("tasks=store sessions=0", "sessions=0"),
        ("tasks=store port=99999", "a port is 0 to 65535"),
    ],
)
def test_a_mistake_is_one_message(capsys, words, message):
    pytest.importorskip("fastapi")
    assert main(["environments", *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_without_the_libraries_it_says_how_to_get_them(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nautilus.serve.api.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["environments", "tasks=store"]) == 2
    assert "a server needs the library 'fastapi'" in capsys.readouterr().err


def test_rows_replace_no_file_that_holds_something_else(tmp_path):
    settings, path = environments.Settings(tasks=("store:1",), problems=3), tmp_path / "rows.jsonl"
    for _ in range(2):  # the same once more
        environments.write_rows(path, [asked("store:1")], settings)
    path.write_text("mine")
    for place in (path, tmp_path):
        with pytest.raises(UserError, match="holds something else"):
            environments.write_rows(place, [asked("store:1")], settings)
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_tasks_are_asked_over_http_until_the_server_is_told_to_end(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "nautilus", "environments", "tasks=store:1-2,count:1", "port=0", f"rows={rows}"]
    running = subprocess.Popen(
        [*command, "problems=4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        greeting = running.stdout.readline()
        assert greeting.startswith("store, count at http://127.0.0.1:"), greeting + running.stderr.read()
        url = greeting.split(" at ")[1].split(": ")[0]
        names = [json.loads(line)["agent_ref"]["name"] for line in rows.read_text().splitlines()]
        assert names == ["store"] * 4 + ["count"] * 4
        task = asked(f"gym@{url}#{rows}").task
        for problem in task.rows:
            episode = task.episode(problem)
            for message in problem.worked:
                if message["role"] == "assistant":
                    episode.hear(reply_of(message))
            assert episode.verdict().reward == 1
        wrong = task.episode(task.rows[-1])
        wrong.hear(Reply(content="none"))
        assert wrong.verdict().reward == 0
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
    finally:
        running.kill()
        running.communicate()
