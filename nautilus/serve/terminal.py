"""A terminal or a pipe: lines in, text out as it is generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for tab and newline: on a terminal they could move the cursor, or do worse.
UNSAFE = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


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
    """To a file or pipe the text as it is; to a terminal nothing that could steer it."""
    if console.is_terminal:
        console.out(printable(text), style=style, end="", highlight=False)
    else:
        console.file.write(text)
        console.file.flush()


def printable(text: str) -> str:
    """The text with its control characters replaced."""
    return text.translate(UNSAFE)
