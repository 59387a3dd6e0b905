"""What a reward says of each token: advantages within a group of answers to one prompt, and what rewards become before.

Advantages compare each answer with the others to the same prompt, itself left out, in mean and in spread:

    b_i = sum of r_j, j not i, / (G - 1)
    v_i = (sum of r_j^2, j not i, / (G - 1) - b_i^2) (G - 1) / (G - 2)
    A_i = (r_i - b_i) / (sqrt(v_i) + 1e-6)   where v_i > 0, else r_i - b_i;   then within [-most, most]

A lone success among failures has v_i = 0 and A = 1. Every token of an answer that the model drew has its A; those of a
turn whose form is broken have `FAULT` in its place.

Source: Nemotron 3 Nano (arXiv 2512.20848), Super (arXiv 2604.12374), and the public code of NeMo-RL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nautilus.config import setting
from nautilus.tasks import Reply

FAULT = -5.0  # of a token in a turn with a call that cannot be read, or with broken thinking
TINY = 1e-6


def leave_one_out(rewards: Sequence[float], most: float = math.inf) -> list[float]:
    """A of the formula; of two answers the spread is not known, and v = 0. ValueError for fewer."""
    count = len(rewards)
    if count < 2:
        raise ValueError(f"a group of {count} answers has no others to compare with; draw two or more for each prompt")
    if not most > 0:
        raise ValueError(f"advantages within {most} were asked for; give more than 0")
    found = []
    for number, reward in enumerate(rewards):
        others = [*rewards[:number], *rewards[number + 1 :]]
        alike = min(others) == max(others)  # then exactly so, whatever rounding says
        mean = others[0] if alike else math.fsum(others) / (count - 1)
        spread = 0.0 if alike else math.fsum((other - mean) ** 2 for other in others) / (count - 2)
        advantage = (reward - mean) / (math.sqrt(spread) + TINY if spread > 0 else 1.0)
        found.append(min(most, max(-most, advantage)))
    return found


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Shorter answers for who asks for less effort, of `length` tokens:

        s = min(1, weight (1 - length / upper)),   R' = R + R max(s, 0) + penalty min(s, 0)

    What is gained takes a right answer, what is lost does not.
    """

    weight: float = setting(0.1, "of shortness, where less effort is asked for")
    upper: int = setting(15_000, "tokens of an answer that is neither short nor long")
    penalty: float = setting(1.0, "of longer ones")

    def __post_init__(self):
        if self.weight < 0 or self.upper < 1 or self.penalty < 0:
            raise ValueError(
                f"weight={self.weight}, upper={self.upper} and penalty={self.penalty} were asked for; give no negative"
                " ones, and an upper length of a token or more"
            )

    def reward(self, reward: float, length: int) -> float:
        shortness = min(1.0, self.weight * (1 - length / self.upper))
        return reward + reward * max(shortness, 0.0) + self.penalty * min(shortness, 0.0)


def form_fault(reply: Reply, *, thinks: bool) -> str:
    """Why an answer earns nothing whatever it says, "" if it may: it is empty, says what it thought once more, or was
    to think and did not stop doing so."""
    if reply.fault:
        return reply.fault
    if not reply.content.strip() and not reply.calls:
        return "the answer is empty"
    if reply.thinking is not None and reply.thinking.strip() == reply.content.strip():
        return "the answer is what was thought, word for word"
    if fault := tag_fault(reply):
        return fault
    return "" if thinks or not reply.thinking else "it thought where it was not to"


def tag_fault(reply: Reply) -> str:
    """Of thinking that opens once more, or closes a second time and again."""
    known = "<think>" in reply.content or "</think>" in reply.content or "<think>" in (reply.thinking or "")
    return "thinking opens or closes where it must not" if known else ""
