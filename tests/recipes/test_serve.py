import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from nautilus.cli import main
from nautilus.data.template import TEMPLATE, template_of
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.model.save import save_model
from nautilus.presets import preset, shrink
from nautilus.recipes import serve
from nautilus.recipes.serve import Settings
from nautilus.runtime import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was never trained, with a tokenizer of bytes and a chat template."""
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    config = dataclasses.replace(shrink(preset("lightning")), vocab=tokenizer.vocab, positions=200, eos=tokenizer.stop)
    path = tmp_path_factory.mktemp("serve") / "model"
    save_model(Language(config).initialise(1), path, tokenizer=tokenizer)
    return path


@pytest.fixture
def libraries():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "no model to serve"),
        ("x log=loud", "log='loud' was asked for; use debug, info or warning"),
        ("x keys=absent", "keys='absent' was given, but there is no such file"),
        ("x port=99999999", "cannot listen at host=127.0.0.1 port=99999999"),
        ("x host=no.such.host.invalid", "cannot listen at host=no.such.host.invalid"),
        ("x port=0", "no folder|neither a folder"),
        ("x defaults.top_p=2", "top_p=2"),
        ("x limits.connections=0", "limits.connections=0 was asked for"),
        ("x limits.rendering=nan", "limits.rendering='nan' is not a finite number"),
        ("x limits.first=-1", "limits.first=-1.0 was asked for, with which nobody could be answered; give 0 or more"),
        ("x step_limit=0", "step_limit=0.0 and grace=30.0 were asked for"),
        ("x step_limit=nan", "step_limit='nan' is not a finite number"),
        ("x grace=-1", "grace=-1.0 were asked for"),
    ],
)
def test_a_mistake_is_one_message(libraries, capsys, words, message):
    assert main(["serve", *words.split()]) == 2
    said = capsys.readouterr().err
    assert any(part in said for part in message.split("|")) and said.count("\n") == 1


def test_a_port_in_use_is_told_before_the_model_is_read(libraries, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "no/such/model", f"port={taken.getsockname()[1]}"]) == 2
    assert "something else listens there; choose another port" in capsys.readouterr().err


def test_without_the_libraries_it_says_how_to_get_them(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nautilus.serve.api.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "x"]) == 2
    said = capsys.readouterr().err
    assert "a server needs the library 'fastapi'" in said and "serve" in said.partition("fastapi")[2]


def test_the_settings_can_be_listed_without_the_libraries(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "limits.body" in said and "defaults.temperature" in said and "keys" in said


def test_who_may_use_the_server_is_warned_of(libraries, tmp_path):
    told = lambda **how: serve.api_module("words").warnings(Settings(model="x", **how))
    file = tmp_path / "keys"
    file.write_text("k" * 40)
    file.chmod(0o600)
    assert told() == told(host="::1") == told(host="0.0.0.0", keys=str(file)) == []
    assert "everybody who reaches host=0.0.0.0 may use this model; give keys=FILE" in told(host="0.0.0.0")[0]
    file.chmod(0o644)
    assert "chmod 600" in told(keys=str(file))[0]


def test_the_name_of_the_model_is_the_folder_s_or_the_hub_s(folder):
    assert serve.name_of(Settings(model=str(folder))) == "model"
    assert serve.name_of(Settings(model="owner/model")) == "owner/model"
    assert serve.name_of(Settings(model=str(folder), name="mine")) == "mine"


def test_the_greeting_says_where_chats_are_not_answered(libraries):
    engine = lambda template: SimpleNamespace(tokenizer=SimpleNamespace(template=template), max_tokens=9)
    greet = lambda template: serve.api_module("words").greeting(engine(template), Settings(model="x"), "x", here)
    with socket.create_server(("127.0.0.1", 0)) as here:
        assert "completions, not chats" in greet(None) and "chats" not in greet("{{ messages }}")


def test_a_model_without_a_chat_template_may_be_given_one(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    assert template_of("", None) is None and template_of("", "own") == "own"
    assert template_of("nemotron", "own") == TEMPLATE and template_of(str(file), "own") == file.read_text()
    with pytest.raises(UserError, match="give a file with a template, or nemotron"):
        template_of(str(tmp_path / "none"), None)
    file.write_text("{% if %}")
    with pytest.raises(UserError):
        template_of(str(file), None)


@pytest.mark.slow
def test_a_real_model_answers_and_ends_when_it_is_told_to(libraries, folder):
    command = [sys.executable, "-m", "nautilus", "serve", str(folder), "port=0", "rows=2", "log=info"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        greeting = running.stdout.readline()
        assert "model answers at http://127.0.0.1:" in greeting, greeting + running.stderr.read()
        url = greeting.partition(" answers at ")[2].partition(": ")[0]
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
        answers = []
        for _ in range(2):
            request = urllib.request.Request(
                f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                answers.append(json.load(answer))
        assert 1 <= answers[0]["usage"]["completion_tokens"] <= 8
        assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        assert running.stderr.read().count('"ended":') == 2
    finally:
        running.kill()
        running.communicate()
