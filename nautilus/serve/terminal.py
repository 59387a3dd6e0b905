"""A terminal or a pipe: lines in, text out as it is generated."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from nautilus.serve.sources import Run

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for tab and newline: on a terminal they could move the cursor, or do worse.
UNSAFE = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}

# How text looks that a draft had foretold; not by its colour alone.
STYLES = {"cache": "cyan underline", "mtp": "magenta italic", "eagle": "yellow bold", "grammar": "blue underline2"}


def lines() -> Iterator[str]:
    """What is typed or piped in, line by line, empty ones left out. Ctrl-C drops the line being typed, Ctrl-D ends."""
    if sys.stdin is None:  # closed by whoever started the program
        return
    if not sys.stdin.isatty():
        yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        return
    with contextlib.suppress(ImportError):  # not every Python has it; it brings editing and the arrow keys
        import readline  # noqa: F401
    with contextlib.suppress(EOFError):
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                if line := input("\n> "):
                    yield line
    print()  # Ctrl-D leaves the cursor behind the prompt


def write(console: Console, text: str, style: str | None = None) -> None:
    """To a file or pipe the text as it is; to a terminal nothing that could steer it, with NO_COLOR no style either."""
    if console.is_terminal:
        console.out(printable(text), style=None if console.no_color else style, end="", highlight=False)
    else:
        console.file.write(text)
        console.file.flush()


def write_runs(console: Console, text: str, runs: Iterable[Run], style: str = "") -> None:
    """A text with each of its runs, [source, tokens, characters], in the style of the source as well; after an
    interruption there may be too few of them."""
    for source, _, characters in runs:
        part, text = text[:characters], text[characters:]
        write(console, part, f"{style} {STYLES.get(source, '')}".strip() or None)
    write(console, text, style or None)


def write_legend(console: Console, sources: Sequence[str]) -> None:
    """How the text of each source looks, and how many tokens it gave."""
    write(console, "tokens:", style="dim")
    for source, count in Counter(sources).most_common():
        write(console, " ")
        write(console, source, STYLES.get(source))
        write(console, f" {count}", style="dim")
    write(console, "\n")


def printable(text: str) -> str:
    """The text with its control characters replaced."""
    return text.translate(UNSAFE)
