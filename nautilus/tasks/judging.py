"""The task of a reward model: of two answers say which is better, and by how much, as JSON (`judge.py`).

What is right was said before, by people in a file of rows, or by the oracle of `style` of two answers that it tells
apart. Either answer comes first as often as the other: with them the scores s change places, and a ranking y becomes
7 - y. In terms of what the model says, with a hat:

    R = -10                                          where it cannot be read,
        -|ŝ_1 - s_1| - |ŝ_2 - s_2| - |ŷ - y|         else;   reward = max(0, 1 + R / 10)

So nothing is earned by what cannot be read, nor by a judgement that is no better than that. A row of a file:

    {"messages": [...], "response_1": "...", "response_2": "...", "score_1": 4, "score_2": 2, "ranking": 2}

Source: Nemotron 3 Nano (arXiv 2512.20848), which does not map R.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from nautilus.tasks.forms import VOCABULARY
from nautilus.tasks.judge import Judgement, asked_to_judge, judgement_of
from nautilus.tasks.style import Style, liked, score
from nautilus.tasks.task import GraderBroken, Message, Problem, Question, Reply, Verdict, assistant

UNREAD = 10.0  # what it costs not to be read
ROW = {"messages": list, "response_1": str, "response_2": str}
SAYS = {"score_1": 5, "score_2": 5, "ranking": 6}  # with the most of each; the least is 1


def within(value: object, most: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= most


class Judge(Question):
    """Of rows, or where there are none of answers to `style`; its levels then, and worked answers that think."""

    name = "judge"

    def __init__(self, rows: Sequence[Mapping[str, Any]] | None = None):
        self.rows, self.style = [*(rows or ())], Style()
        if rows is not None and not rows:
            raise ValueError("the task judge has no rows")
        for number, row in enumerate(self.rows, 1):
            if lacking := [key for key, kind in ROW.items() if not isinstance(row.get(key), kind)]:
                raise ValueError(f"row {number} of judge has no {', '.join(lacking)}: a list of messages, two texts")
        self.levels, self.thinks = (range(1, 2), False) if rows else (self.style.levels, True)

    def draw(self, rng: random.Random, level: int) -> Problem:
        return self.of_row(rng) if self.rows else self.of_style(rng, level)

    def of_row(self, rng: random.Random) -> Problem:
        row = rng.choice(self.rows)
        said = {key: row[key] for key, most in SAYS.items() if within(row.get(key), most)}
        # A row without them costs its own problem: what is said of it cannot be judged.
        right = Judgement(**said) if len(said) == len(SAYS) else None
        answers = (row["response_1"], row["response_2"])
        return self.problem(rng, 1, row["messages"], answers, right, ("", ""))

    def of_style(self, rng: random.Random, level: int) -> Problem:
        asked = self.style.draw(rng, level)
        while True:
            answers = (candidate(rng, asked.truth), candidate(rng, asked.truth))
            parts = [liked(asked.truth, answer) for answer in answers]
            if score(parts[0]) != score(parts[1]):
                break
        right = self.style.compare(asked, *(Reply(content=answer) for answer in answers))
        return self.problem(rng, level, asked.messages, answers, right, (reasons(parts[0]), reasons(parts[1])))

    def problem(
        self, rng: random.Random, level: int, messages: Sequence[Message], answers: tuple[str, str],
        right: Judgement | None, why: tuple[str, str],
    ) -> Problem:  # fmt: skip
        """In one order or the other."""
        if rng.random() < 0.5:
            answers, why = (answers[1], answers[0]), (why[1], why[0])
            right = right and right.swapped
        thought = f"1: {why[0]}; 2: {why[1]}" if any(why) else ""
        return Problem(
            task=self.name, level=level, messages=asked_to_judge(messages, *answers),
            truth=right and {key: getattr(right, key) for key in SAYS},
            worked=(assistant(right.text, thought),) if right else (),
        )  # fmt: skip

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        if not problem.truth:
            raise GraderBroken(f"problem {problem.id} of judge lacks one of {', '.join(SAYS)}")
        return lesson(judgement_of(reply.content), Judgement(**problem.truth))


def lesson(said: Judgement, right: Judgement) -> Verdict:
    """The formula; its terms are the parts, and so is R."""
    if not said.readable:
        return Verdict(reward=0.0, why="no judgement could be read", parts={"readable": 0.0, "raw": -UNREAD})
    off = {key: abs(getattr(said, key) - getattr(right, key)) for key in SAYS}
    raw = -sum(off.values())
    parts = {"readable": 1.0, **{f"off_{key}": value for key, value in off.items()}, "raw": raw}
    return Verdict(reward=max(0.0, 1 + raw / UNREAD), why=f"{said.text}, {right.text}", parts=parts)


# ----- answers to be told apart ---------------------------------------------------------------------------------------


def candidate(rng: random.Random, words: Sequence[str]) -> str:
    """An answer to `style`, good or bad: some of the words or another one, in a list or not, warm or not."""
    some = rng.sample(words, rng.randint(1, len(words))) if rng.random() < 0.9 else [rng.choice(VOCABULARY)]
    text = "\n".join(f"- {word}" for word in some) if rng.random() < 0.5 else ", ".join(some)
    return text + rng.choice(("", "!"))


def reasons(parts: Mapping[str, float]) -> str:
    """Before a score: named 1.00, listed 0.50, warm 1.00, so 4."""
    told = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    return f"{told}, so {round(score(dict(parts)))}"
