"""Text that a model must not learn from, because it has the words of a problem that a task holds back to measure with.

Words are runs of letters and digits in lower case. A text hits a problem if it shares a run of `words` words with a
message that the problem shows, or if it asks the same word for word, however short that is. The second is looked for in
questions only: a few words of an answer may be those of a short problem by chance.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nautilus.posttrain.profile import exam
from nautilus.runtime import UserError
from nautilus.tasks import Problem
from nautilus.tasks.asked import Asked, asked
from nautilus.tasks.named import TASKS
from nautilus.tasks.rows import Rows

WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[at : at + length]) for at in range(len(words) - length + 1))


class HeldBack:
    """problems: by the name of their task; where several share words, the first task is named."""

    def __init__(self, problems: Mapping[str, Iterable[Problem]], words: int = 13):
        self.words, self.runs, self.whole = words, dict[str, str](), dict[str, str]()
        for name, some in problems.items():
            for text in (shown for problem in some for shown in shown_by(problem)):
                known = words_of(text)
                self.whole.setdefault(" ".join(known), name)
                for run in runs(known, words):
                    self.runs.setdefault(run, name)
        self.whole.pop("", None)

    def hit(self, question: str, *texts: str) -> tuple[str, str] | None:
        """(the task, the words that are shared) of the first problem that is met."""
        whole = " ".join(words_of(question))
        if whole in self.whole:
            return self.whole[whole], whole
        for text in (question, *texts):
            for run in runs(words_of(text), self.words):
                if run in self.runs:
                    return self.runs[run], run
        return None


def shown_by(problem: Problem) -> Iterator[str]:
    """What its user says. System messages are the same for many problems, and hold nothing of any."""
    return (str(message.get("content") or "") for message in problem.messages if message.get("role") == "user")


def kept_out(against: Sequence[str]) -> dict[str, Asked]:
    """By name: every procedural task, and those that are named; UserError for one that is none."""
    return {words: asked(words) for words in dict.fromkeys((*TASKS, *against))}


def held_back(tasks: Mapping[str, Asked], count: int) -> dict[str, list[Problem]]:
    """By name: of each task `count` problems of each level that nobody trains on; of a file of rows all of them, as
    others measure with those too."""
    return {words: problems_of(words, one, count) for words, one in tasks.items()}


def problems_of(words: str, one: Asked, count: int) -> list[Problem]:
    if isinstance(one.task, Rows):
        return one.task.rows
    try:
        return [problem for level in one.levels for problem in exam(one.task, count, levels=[level])]
    except ValueError as bad:
        raise UserError(f"against={words} was asked for, but it holds nothing back: {bad}; leave it out") from bad
