"""A machine of one number: programs that are easily run, broken and mended.

A program is a list of instructions; the number that it is given goes through all of them:

    add 3    sub 2    mul 4    neg    abs    max 5    min 7
"""

from __future__ import annotations

import random
from collections.abc import Sequence

WITH_NUMBER = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__, "max": max, "min": min}
ALONE = {"neg": int.__neg__, "abs": int.__abs__}
SMALL, LARGE = range(-9, 10), range(10, 100)  # numbers that programs are tried on
BEYOND = 10**12  # a number that is larger ends the run


def run(program: Sequence[str], value: int) -> int:
    """ValueError for an instruction that is none, and for numbers that grow without end."""
    for line in program:
        match line.split():
            case [name] if name in ALONE:
                value = ALONE[name](value)
            case [name, number] if name in WITH_NUMBER and number.lstrip("-").isdecimal():
                value = WITH_NUMBER[name](value, int(number))
            case _:
                raise ValueError(f"{line!r} is no instruction; write {' N, '.join(WITH_NUMBER)} N, {', '.join(ALONE)}")
        if abs(value) > BEYOND:
            raise ValueError(f"after {line!r} the number is beyond {BEYOND}")
    return value


def told_program(program: Sequence[str]) -> str:
    return "\n".join(f"{number}: {line}" for number, line in enumerate(program, 1))


def instruction(rng: random.Random) -> str:
    name = rng.choice([*WITH_NUMBER, *ALONE])
    return f"{name} {rng.randint(2, 9)}" if name in WITH_NUMBER else name


def broken(rng: random.Random, lines: int) -> tuple[list[str], list[str], int]:
    """A program, the same with a wrong line, and which one; they differ for small numbers and for large ones."""
    while True:
        right, at = [instruction(rng) for _ in range(lines)], rng.randrange(lines)
        wrong = [instruction(rng) if number == at else line for number, line in enumerate(right)]
        if all(differing(right, wrong, values) for values in (SMALL, LARGE)):
            return right, wrong, at


def differing(right: Sequence[str], wrong: Sequence[str], values: range) -> list[int]:
    return [value for value in values if run(right, value) != run(wrong, value)]


def telling(rng: random.Random, right: Sequence[str], wrong: Sequence[str], values: range, count: int) -> list[int]:
    """So many of the values, for one of which at least the programs differ."""
    one = rng.choice(differing(right, wrong, values))
    return sorted([one, *rng.sample([value for value in values if value != one], count - 1)])
