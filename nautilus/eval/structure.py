"""How much of an answer stands in its prompt already, and how much of a text is code or data. Both from plain text, so
that they are the same for every tokenizer."""

from __future__ import annotations

import re

RUN = 4  # words in a row that count as copied
WORD = re.compile(r"\w+|[^\w\s]")
# A line that is indented, begins or ends with a bracket, assigns, calls, names a field or declares. A rule of thumb.
CODE = re.compile(
    r"""^\s{4}|^\s*[\[\]{}()<|]|[\[\]{}()<>;|]$|":|\s[-+*/!<>=]?=\s|\w\(|^\s*(def|class|return|import|SELECT|CREATE|INSERT|UPDATE)\s"""
)


def copied(prompt: str, answer: str) -> float:
    """The share of the answer's words that stand in a run of RUN words of the prompt; nan for an answer without any."""
    known, words = WORD.findall(prompt), WORD.findall(answer)
    runs = {tuple(known[i : i + RUN]) for i in range(len(known) - RUN + 1)}
    found = [False] * len(words)
    for i in range(len(words) - RUN + 1):
        if tuple(words[i : i + RUN]) in runs:
            found[i : i + RUN] = [True] * RUN
    return sum(found) / len(found) if found else float("nan")


def coded(text: str) -> float:
    """The share of a text's characters, white space apart, in lines of code or data; nan for a text without any."""
    sizes = [(len("".join(line.split())), bool(CODE.search(line.rstrip()))) for line in text.splitlines()]
    total = sum(size for size, _ in sizes)
    return sum(size for size, code in sizes if code) / total if total else float("nan")
