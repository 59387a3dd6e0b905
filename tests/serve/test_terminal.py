import io
import unicodedata

import hypothesis.strategies as st
from hypothesis import given
from rich.console import Console

from nautilus.serve.terminal import lines, printable, write, write_runs


@given(text=st.text())
def test_printable_text_holds_no_control_characters_and_keeps_its_layout(text):
    shown = printable(text)
    assert len(shown) == len(text)
    for old, new in zip(text, shown, strict=True):
        assert new == ("\ufffd" if unicodedata.category(old) == "Cc" and old not in "\t\n" else old)


def test_a_model_cannot_clear_the_screen():
    assert printable("a\x1b[2Jb\x9bc\td\n") == "a\ufffd[2Jb\ufffdc\td\n"


@given(pieces=st.lists(st.text(alphabet="ab \t\r\n\x1b", max_size=9)))
def test_a_pipe_gets_the_text_as_it_is(pieces):
    console = Console(file=io.StringIO())
    for piece in pieces:
        write(console, piece, style="dim")
    assert console.file.getvalue() == "".join(pieces)


@given(pieces=st.lists(st.text(alphabet="ab :[]\n", max_size=9)))
def test_a_terminal_gets_the_text_unwrapped_and_unread(pieces):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=10)
    for piece in pieces:
        write(console, piece)
    assert console.file.getvalue() == "".join(pieces)


def test_runs_of_a_text_come_in_the_styles_of_their_sources_and_only_where_colours_are_wanted():
    runs, text = [["plain", 1, 2], ["grammar", 1, 0], ["eagle", 2, 2], ["new", 1, 1]], "abc\x1be"
    for environment, seen in (({}, "ab\x1b[1;33mc\ufffd\x1b[0me"), ({"NO_COLOR": "1"}, "abc\ufffde")):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system="standard", _environ=environment)
        write_runs(console, text, runs)
        assert file.getvalue() == seen
    file = io.StringIO()
    write_runs(Console(file=file), text, runs)
    write_runs(Console(file=file), text, runs[:1])
    assert file.getvalue() == text + text


def test_piped_lines_come_one_by_one_without_their_ends_and_without_empty_ones(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\r\n three"))
    assert list(lines()) == ["one", "two", " three"]


def test_at_a_terminal_ctrl_c_drops_a_line_and_ctrl_d_ends(monkeypatch):
    typed = iter(["one", KeyboardInterrupt, "", "two", EOFError])

    def typing(prompt):
        key = next(typed)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", typing)
    assert list(lines()) == ["one", "two"]
