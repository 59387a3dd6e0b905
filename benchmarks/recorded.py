"""Rows of measurements, appended to a file with the command that gave them."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from train_step import machine


def words_of(given: Sequence[str]) -> list[str]:
    """A command line without what says where its record goes."""
    return [word for word, before in zip(given, ["", *given], strict=False) if "--record" not in (word, before)]


def append(path: Path | None, program: str, words: Sequence[str], rows: Sequence[dict], **more) -> None:
    """A line of JSON; nothing where no file is named."""
    if path is None:
        return
    command = shlex.join(["python", f"benchmarks/{program}", *words_of(words)])
    line = {"command": command, "machine": machine(), "date": f"{datetime.date.today()}", **more, "rows": list(rows)}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
