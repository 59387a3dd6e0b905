"""A matter of taste: things to be named, and an oracle that likes lists, and warmth.

It stands for a reward model where none was trained, and says what it thinks as one would (`judge.py`). The worked
answer is plain, so the taste has to be learnt from comparisons.
"""

from __future__ import annotations

import random

from nautilus.tasks.forms import VOCABULARY
from nautilus.tasks.judge import Judgement
from nautilus.tasks.task import Problem, Question, Reply, Verdict, assistant, user


class Style(Question):
    """Levels are words beyond one. A verdict is how much the oracle likes an answer, from 0 to 1."""

    name, levels = "style", range(1, 4)
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        words = rng.sample(VOCABULARY, level + 1)
        asked = user(f"Tell me of {' and '.join(words)}.")
        worked = assistant(", ".join(words))
        return Problem(task=self.name, level=level, messages=asked, truth=words, worked=(worked,))

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        parts = liked(problem.truth, reply.content)
        return Verdict(
            reward=(score(parts) - 1) / 4, why=", ".join(f"{k} {v:.2f}" for k, v in parts.items()), parts=parts
        )

    def compare(self, problem: Problem, first: Reply, second: Reply) -> Judgement:
        """What a reward model would say of two answers."""
        one, other = (score(liked(problem.truth, reply.content)) for reply in (first, second))
        ranking = min(6, max(1, round(3.5 - 0.625 * (one - other) - 1e-9)))
        return Judgement(score_1=round(one), score_2=round(other), ranking=ranking)


def liked(words: list[str], answer: str) -> dict[str, float]:
    """Of the words how many are named, and how many begin a line of a list; whether it ends with an exclamation."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    named = sum(word in answer.lower() for word in words) / len(words)
    listed = sum(any(line.startswith(f"- {word}") for line in lines) for word in words) / len(words)
    return {"named": named, "listed": listed, "warm": float(answer.rstrip().endswith("!"))}


def score(parts: dict[str, float]) -> float:
    return 1 + parts["named"] + 2 * parts["listed"] + parts["warm"] * parts["named"]
