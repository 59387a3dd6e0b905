"""Rewards from comparisons: a generative reward model reads two answers and says which is better, and by how much.

It scores both from 1 to 5 and ranks them from 1, the first far better, to 6, the second far better. Of G answers to one
prompt each is compared with the next one, the last with the first: G comparisons instead of G(G-1)/2, and each answer
is judged once in either place.

    s_1 == s_2:   s_1 += 3.5 - ranking,  s_2 -= 3.5 - ranking
    base_i      = mean of its two scores
    w_i         = 1 - (length_i - least) / (most - least), less their mean; 0 where all are as long
    R_i         = base_i + thinking * w_i(thinking) + answer * w_i(answer) + bonus

The bonus is the shortest answer's, if it is among the best.
Source: Nemotron 3 Nano (arXiv 2512.20848) and Super (arXiv 2604.12374), reinforcement learning from human feedback.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nautilus.config import setting
from nautilus.tasks.task import Message, Reply, user

MIDDLE = 3.5  # of the ranks
OBJECT = re.compile(r"\{[^{}]*\}")
ASKS = (
    "Two answers to the last message of this conversation are given. Say which one is better, as JSON: score_1 and"
    " score_2 from 1 to 5, and ranking from 1, the first is far better, to 6, the second is far better."
)


def asked_to_judge(messages: Sequence[Message], first: str, second: str) -> tuple[Message, ...]:
    """What a reward model is shown, in training and in use."""
    turns = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)
    return user(f"{ASKS}\n\n{turns}\n\nanswer 1: {first}\n\nanswer 2: {second}")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of a first and a second answer; as it stands here, what counts where none could be read."""

    score_1: float = 3.0
    score_2: float = 3.0
    ranking: float = MIDDLE
    readable: bool = True

    @property
    def scores(self) -> tuple[float, float]:
        """With equal ones told apart by the ranking; their sum stays."""
        more = MIDDLE - self.ranking if self.score_1 == self.score_2 else 0.0
        return self.score_1 + more, self.score_2 - more

    @property
    def swapped(self) -> Judgement:
        """What it says of the same answers, the second one first."""
        return replace(self, score_1=self.score_2, score_2=self.score_1, ranking=round(2 * MIDDLE) - self.ranking)

    @property
    def text(self) -> str:
        """As a reward model writes it."""
        return json.dumps({"score_1": self.score_1, "score_2": self.score_2, "ranking": self.ranking})


UNREADABLE = Judgement(readable=False)


def judgement_of(text: str) -> Judgement:
    """The last object in the text that is one, UNREADABLE where there is none."""
    for found in reversed(OBJECT.findall(text)):
        try:
            told = json.loads(found)
            first, second, ranking = (float(told[key]) for key in ("score_1", "score_2", "ranking"))
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        one = Judgement(score_1=first, score_2=second, ranking=ranking)
        if 1 <= one.score_1 <= 5 and 1 <= one.score_2 <= 5 and 1 <= one.ranking <= 6:
            return one
    return UNREADABLE


@dataclass(frozen=True, kw_only=True)
class LengthControl:
    """How much shorter answers count, within those to one prompt. bonus: of the one that is shortest, if its base is
    among the best `top` of them."""

    thinking: float = setting(0.5, "how much shorter thinking counts, beside other answers to the prompt")
    answer: float = setting(0.5, "how much a shorter answer does")
    bonus: float = setting(0.5, "of the shortest, if it is among the best")
    top: float = setting(0.2, "which these are, as a share")

    def __post_init__(self):
        if min(self.thinking, self.answer, self.bonus) < 0 or not 0 < self.top <= 1:
            raise ValueError(
                f"thinking={self.thinking}, answer={self.answer}, bonus={self.bonus} and top={self.top} were asked for;"
                " none may be negative, and top is a share of the answers"
            )


def circular(count: int) -> list[tuple[int, int]]:
    """Which answers are compared, by number; ValueError for fewer than two."""
    if count < 2:
        raise ValueError(f"comparisons of {count} answers were asked for; a prompt needs two or more")
    return [(number, (number + 1) % count) for number in range(count)]


def base_scores(judgements: Sequence[Judgement]) -> list[float]:
    """Of as many answers, judged in a circle."""
    found: list[list[float]] = [[] for _ in judgements]
    for (first, second), one in zip(circular(len(judgements)), judgements, strict=True):
        for number, score in zip((first, second), one.scores, strict=True):
            found[number].append(score)
    return [statistics.fmean(scores) for scores in found]


def shortness(lengths: Sequence[int]) -> list[float]:
    """w of the formula; its sum is 0."""
    least, most = min(lengths), max(lengths)
    if least == most:
        return [0.0] * len(lengths)
    weights = [1 - (length - least) / (most - least) for length in lengths]
    return [weight - statistics.fmean(weights) for weight in weights]


def rewards(judgements: Sequence[Judgement], replies: Sequence[Reply], control: LengthControl) -> list[float]:
    """Of the answers to one prompt; lengths are characters."""
    bases = base_scores(judgements)
    good = sorted(bases, reverse=True)[max(1, round(control.top * len(bases))) - 1]
    total = [*bases]
    for weight, lengths in (
        (control.thinking, [len(reply.thinking or "") for reply in replies]),
        (control.answer, [len(reply.content) for reply in replies]),
    ):
        for number, short in enumerate(shortness(lengths)):
            total[number] += weight * short
        shortest = lengths.index(min(lengths))
        if weight and lengths.count(min(lengths)) == 1 and bases[shortest] >= good:
            total[shortest] += control.bonus
    return total
