import contextlib
import dataclasses
import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import nautilus
from nautilus.cli import main
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.model.save import save_model
from nautilus.presets import preset, shrink
from nautilus.recipes import chat
from nautilus.recipes.chat import Settings
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling

torch.set_num_threads(1)
SHORT = Sampling(seed=1, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was never trained, with a tokenizer of bytes and a chat template."""
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    config = dataclasses.replace(shrink(preset("lightning")), vocab=tokenizer.vocab, positions=200, eos=tokenizer.stop)
    path = tmp_path_factory.mktemp("chat") / "model"
    save_model(Language(config).initialise(1), path, tokenizer=tokenizer)
    return path


class Scripted(torch.nn.Module):
    """A model that gives the same answer to everything; it counts the tokens since the prompt."""

    def __init__(self, config, tokens):
        super().__init__()
        self.config, self.tokens = config, tokens
        self.head_weight = torch.nn.Parameter(torch.eye(config.vocab))
        self.compute, self.cache_scales, self.prompt = torch.float32, {}, 0

    def hidden(self, tokens_BT, state):
        length = int(state.rows.length[0])
        if tokens_BT.shape[1] > 1:
            self.prompt = length
        return self.head_weight[self.tokens[length - self.prompt]].expand(*tokens_BT.shape, -1) * 99, state

    def head(self, hidden_BTD):
        return hidden_BTD


def says(monkeypatch, folder, answer):
    model, tokenizer = nautilus.load(folder)
    scripted = Scripted(model.config, [*tokenizer.encode(answer, control=True), tokenizer.eos])
    monkeypatch.setattr(nautilus, "load", lambda source: (scripted, tokenizer))


def talk(monkeypatch, capsys, folder, *typed, **changes):
    """The answers to these lines, one a line, and the remarks."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    chat.main(Settings(model=str(folder), **({"sampling": SHORT} | changes)))
    return capsys.readouterr()


def asked(monkeypatch):
    """Collects the text of every prompt that reaches the engine."""
    prompts, plain = [], Engine.stream

    def stream(self, prompt, sampling):
        prompts.append(self.tokenizer.decode(prompt))
        return plain(self, prompt, sampling)

    monkeypatch.setattr(Engine, "stream", stream)
    return prompts


def test_one_prompt_on_the_command_line_is_answered_on_stdout(folder):
    words = [
        sys.executable,
        "-m",
        "nautilus",
        "chat",
        str(folder),
        "--raw",
        "--prompt",
        "ab c",
        "sampling.max_tokens=9",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    sampling = dataclasses.replace(Settings().sampling, max_tokens=9)
    completion = Engine(*nautilus.load(folder)).generate(["ab c"], sampling)[0]
    assert (done.returncode, done.stdout) == (0, completion.text + "\n"), done.stderr
    assert f"{len(completion.tokens)} tokens, the first after" in done.stderr and "tokens/s" in done.stderr


def test_piped_lines_make_a_conversation(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "so</think>\nyes")
    prompts = asked(monkeypatch)
    said = talk(monkeypatch, capsys, folder, "one", "", "two", system="be kind")
    assert said.out == "yes\nyes\n" and said.err.count("tokens/s") == 2
    assert [prompt.count("be kind") for prompt in prompts] == [1, 1]
    assert "one" in prompts[1] and "two" in prompts[1] and prompts[1].count("yes") == 1


def test_reasoning_stays_out_of_a_pipe_and_is_set_apart_on_a_terminal(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "hm</think>\nyes")
    assert talk(monkeypatch, capsys, folder, prompt="one").out == "yes\n"
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    seen = talk(monkeypatch, capsys, folder, prompt="one").out
    assert seen.startswith("\x1b[2mh\x1b[0m\x1b[2mm\x1b[0m\n\ny") and seen.endswith("yes\n")


def test_without_thinking_everything_is_content(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "yes")
    assert talk(monkeypatch, capsys, folder, prompt="one", thinking=False).out == "yes\n"


def test_reset_forgets_what_was_said_and_keeps_the_system_message(monkeypatch, capsys, folder):
    prompts = asked(monkeypatch)
    talk(monkeypatch, capsys, folder, "one", "/reset", "one", system="be kind")
    assert prompts[0] == prompts[1] and "be kind" in prompts[1]


def drafted(monkeypatch, turns):
    """Says of the tokens in turn that they came from these sources."""
    plain = Engine.stream

    def stream(self, prompt, sampling):
        for at, piece in enumerate(plain(self, prompt, sampling)):
            yield piece._replace(source=turns[at % len(turns)])

    monkeypatch.setattr(Engine, "stream", stream)


def test_on_a_terminal_text_that_was_foretold_is_marked(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "hm</think>\nyes")
    drafted(monkeypatch, ("plain", "cache", "plain", "plain", "cache", "mtp"))
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    seen = talk(monkeypatch, capsys, folder, prompt="one", sources=True)
    assert seen.out.startswith("\x1b[2mh\x1b[0m\x1b[2;4;36mm\x1b[0m\n\n\x1b[4;36my\x1b[0m\x1b[3;35me\x1b[0ms")
    for legend in (
        "plain\x1b[2m 4\x1b[0m",
        "\x1b[4;36mcache\x1b[0m\x1b[2m 3\x1b[0m",
        "\x1b[3;35mmtp\x1b[0m\x1b[2m 1\x1b[0m",
    ):
        assert legend in seen.err
    assert "8 tokens in 5 passes, the first after" in seen.err
    monkeypatch.setenv("NO_COLOR", "1")
    seen = talk(monkeypatch, capsys, folder, prompt="one", sources=True)
    assert seen.out == "hm\n\nyes\n" and "\x1b" not in seen.err and "8 tokens in 5 passes" in seen.err


def test_a_pipe_gets_no_marks_and_only_who_asks_for_sources_gets_them(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "hm</think>\nyes")
    drafted(monkeypatch, ("plain", "cache"))
    seen = talk(monkeypatch, capsys, folder, prompt="one", sources=True)
    assert seen.out == "yes\n" and "tokens: plain 4 cache 4\n" in seen.err and "8 tokens in 5 passes" in seen.err
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    seen = talk(monkeypatch, capsys, folder, prompt="one")
    assert "\x1b[4" not in seen.out and "passes" not in seen.err and "cache" not in seen.err


def test_drafts_change_no_word(monkeypatch, capsys, folder):
    made, plain = [], Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *given, **more: made.append(more) or plain(self, *given, **more)
    )
    said = [talk(monkeypatch, capsys, folder, "ab ab ab", "ab", raw=True, drafts=drafts).out for drafts in (0, 4)]
    assert said[0] == said[1] and [more["drafts"] for more in made] == [0, 4]


def test_a_seed_can_be_chosen(monkeypatch, capsys, folder):
    lines = ("ab", "/seed 5", "ab", "/seed 1", "ab", "/seed five", "/seed 99999999999999999999999")
    said = talk(monkeypatch, capsys, folder, *lines, raw=True)
    first, second, third = said.out.splitlines()
    assert first == third != second and said.err.count("is no command") == 2


def test_quit_ends(monkeypatch, capsys, folder):
    prompts = asked(monkeypatch)
    talk(monkeypatch, capsys, folder, "one", "/quit", "two")
    assert len(prompts) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "so</think>yes and more")
    plain = Engine.stream

    def stream(self, prompt, sampling):
        for count, piece in enumerate(plain(self, prompt, sampling)):
            yield piece
            if piece.text == "s" and count > 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", stream)
    said = talk(monkeypatch, capsys, folder, "one", "two", sampling=Sampling(temperature=0))
    assert said.out == "yes\nyes\n"


def test_a_conversation_that_became_too_long_is_no_end(monkeypatch, capsys, folder):
    says(monkeypatch, folder, "so</think>yes")
    said = talk(monkeypatch, capsys, folder, "a" * 300, "b", "/reset", "b")
    assert said.out == "yes\nyes\n" and "shorten the prompt; /reset" in said.err


def test_a_model_without_a_chat_template_continues_text(monkeypatch, capsys, folder):
    model, tokenizer = nautilus.load(folder)
    tokenizer.template = None
    monkeypatch.setattr(nautilus, "load", lambda source: (model, tokenizer))
    said = talk(monkeypatch, capsys, folder, prompt="ab c")
    assert said.out == Engine(model, tokenizer).generate(["ab c"], SHORT)[0].text + "\n"


def test_on_a_terminal_the_text_that_is_continued_stands_before_its_continuation(monkeypatch, capsys, folder):
    model, tokenizer = nautilus.load(folder)
    continued = Engine(model, tokenizer).generate(["ab c"], SHORT)[0].text
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    assert talk(monkeypatch, capsys, folder, prompt="ab c", raw=True).out.startswith("\x1b[2mab c\x1b[0m")
    assert "ab c" not in talk(monkeypatch, capsys, folder, prompt="ab c").out  # an answer is none
    monkeypatch.setattr(Console, "is_terminal", False)
    assert talk(monkeypatch, capsys, folder, prompt="ab c", raw=True).out == continued + "\n"


def test_the_speed_is_that_of_steps_after_the_first_two():
    slow = [0.0, 3.0, 4.0, 6.0]  # asked, a prompt read, a step computed, a step recorded
    assert chat.speed([*slow, 6.5, 7.0, 7.5, 8.0, 8.5]) == "8 tokens, the first after 3.00 s, then 2.0 tokens/s"
    assert chat.speed([*slow, 6.5, 7.0, 7.5, 8.0]) == "7 tokens, the first after 3.00 s"
    assert chat.speed([0.0, 3.0, 4.0], 1) == "2 tokens in 1 pass, the first after 3.00 s"
    assert chat.speed([0.0, 3.0]) == "1 token, the first after 3.00 s" and "stopped" in chat.speed([0.0])


TYPING = """
import fcntl, os, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import nautilus.recipes.chat as chat
from nautilus.cli import main
from nautilus.runtime import echo
plain = chat.nautilus.load
def load(source):
    os.write(1, b"<loading>")
    time.sleep(1)
    return plain(source)
chat.nautilus.load = load
sys.exit(main(sys.argv[1:]))
"""


def test_what_is_typed_while_a_model_loads_is_shown_once(folder):
    ours, theirs = os.openpty()
    words = [sys.executable, "-c", TYPING, "chat", str(folder), "--raw", "sampling.max_tokens=9"]
    told = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with subprocess.Popen(words, env=os.environ | {"TERM": "dumb"}, **told) as child:
        os.close(theirs)
        shown = b""
        while b"<loading>" not in shown:
            shown += os.read(ours, 9999)
        os.write(ours, b"zebra\n/quit\n")
        with contextlib.suppress(OSError):  # what Linux says once the other side is closed
            while part := os.read(ours, 9999):
                shown += part
    os.close(ours)
    assert child.returncode == 0 and shown.count(b"zebra") == 1 and shown.count(b"> /quit") == 1, shown


def test_no_model_is_an_error_that_says_how_to_name_one():
    with pytest.raises(ValueError, match="nautilus chat MODEL"):
        chat.main(Settings())


def test_a_closed_standard_input_ends_the_talk(folder):
    for redirect in ("< /dev/null", "<&-"):
        command = f"{sys.executable} -m nautilus chat {folder} {redirect}"
        ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0 and ended.stdout == "" and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("tokenizer.json", '{"version": "1.0", "trunc', "tokenizer.json is no tokenizer"),
        ("tokenizer_config.json", '{"eos_token": ', "tokenizer_config.json is not valid JSON"),
        ("config.json", "[" * 100_000, "config.json is not valid JSON"),
        ("config.json", '{"a":' * 70 + "1" + "}" * 70, "config.json is nested more than 64 levels deep"),
        ("generation_config.json", '{"eos_token_id": 99999999999}', "must be token ids"),
        ("chat_template.jinja", "{% for message in %}", "not valid jinja"),
    ],
)
def test_a_broken_folder_is_one_message(folder, tmp_path, capsys, file, content, message):
    broken = shutil.copytree(folder, tmp_path / "model")
    (broken / file).write_text(content)
    with pytest.raises(UserError, match=message):
        nautilus.load(broken)
    assert main(["chat", str(broken), "prompt=hello"]) == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1
    assert main(["info", str(broken)]) == (2 if file == "config.json" else 0)  # it reads no other file
    shown = capsys.readouterr().err
    assert (message in shown and len(shown.splitlines()) == 1) or shown == ""


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_refused(folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "model")
    train_tokenizer(["so so so so"], vocab=SMALLEST + 1).save(other)
    assert main(["chat", str(other), "prompt=hello"]) == 2
    shown = capsys.readouterr().err
    assert f"{other} has {SMALLEST + 1} tokens, the model's vocabulary {SMALLEST}; copy there" in shown
    assert len(shown.splitlines()) == 1 and main(["info", str(other)]) == 0
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json in .*; copy .* from the release; .* need none"):
        nautilus.load(other)
    assert main(["info", str(other)]) == 0


def test_a_hub_id_without_a_hub_is_one_message(capsys):
    assert main(["chat", "no/such-model"]) == 2
    shown = capsys.readouterr().err
    assert "no folder 'no/such-model' here, and the hub could not be reached" in shown
    assert len(shown.splitlines()) == 1
