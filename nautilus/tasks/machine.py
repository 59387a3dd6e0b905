"""A stack machine: programs that are easily run, broken and mended.

A program is a list of instructions. The stack begins with the number that the program is given; what is on top in the
end is what it gives:

    push 3             puts a number on top
    add sub mul max    take two numbers and put back one; `sub` takes the upper one from the lower one
    neg dup swap       the top with the other sign; the top once more; the two on top changed about
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

Effect = tuple[int, Callable[..., list[int]]]  # how many numbers it takes off, and what it puts there instead
EFFECTS: dict[str, Effect] = {
    "add": (2, lambda a, b: [a + b]), "sub": (2, lambda a, b: [a - b]), "mul": (2, lambda a, b: [a * b]),
    "max": (2, lambda a, b: [max(a, b)]), "neg": (1, lambda a: [-a]), "dup": (1, lambda a: [a, a]),
    "swap": (2, lambda a, b: [b, a]),
}  # fmt: skip
SMALL, LARGE = range(-9, 10), range(10, 100)  # numbers that programs are tried on
BEYOND = 10**12  # a number that is larger ends the run


def run(program: Sequence[str], value: int) -> int:
    """ValueError for an instruction that is none or finds too few numbers, and for numbers that grow without end."""
    stack = [value]
    for line in program:
        takes, effect = read(line)
        if (left := len(stack) - takes) < 0:
            raise ValueError(f"{line!r} takes {takes} numbers, and the stack has {len(stack)}")
        stack = [*stack[:left], *effect(*stack[left:])]
        if abs(stack[-1]) > BEYOND:
            raise ValueError(f"after {line!r} the number is beyond {BEYOND}")
    return stack[-1]


@functools.lru_cache
def read(line: str) -> Effect:
    """ValueError for an instruction that is none."""
    match line.split():
        case ["push", number] if number.removeprefix("-").isdecimal():
            value = int(number)
            return 0, lambda: [value]
        case [name] if name in EFFECTS:
            return EFFECTS[name]
    raise ValueError(f"{line!r} is no instruction; write push N, {', '.join(EFFECTS)}")


def gives(program: Sequence[str], value: int) -> int | None:
    """None where the run ends before the program does."""
    try:
        return run(program, value)
    except ValueError:
        return None


def told_program(program: Sequence[str]) -> str:
    return "\n".join(f"{number}: {line}" for number, line in enumerate(program, 1))


def instruction(rng: random.Random) -> str:
    return f"push {rng.randint(2, 9)}" if rng.random() < 0.3 else rng.choice([*EFFECTS])


def broken(rng: random.Random, lines: int) -> tuple[list[str], list[str], int]:
    """A program, the same with a wrong line, and which one; they differ for small numbers and for large ones."""
    while True:
        right, at = [instruction(rng) for _ in range(lines)], rng.randrange(lines)
        wrong = [instruction(rng) if number == at else line for number, line in enumerate(right)]
        if heeds(right) and all(any(differing(right, wrong, values)) for values in (SMALL, LARGE)):
            return right, wrong, at


def heeds(program: Sequence[str]) -> bool:
    """Whether it gives something whatever it is given, and not always the same; what decides most comes first."""
    one = gives(program, 1)
    if one is None or all(gives(program, value) == one for value in SMALL):
        return False
    return None not in (gives(program, value) for value in (*SMALL, *LARGE))


def differing(right: Sequence[str], wrong: Sequence[str], values: range) -> Iterator[int]:
    return (value for value in values if gives(right, value) != gives(wrong, value))


def telling(rng: random.Random, right: Sequence[str], wrong: Sequence[str], values: range, count: int) -> list[int]:
    """So many of the values, for one of which at least the programs differ."""
    one = rng.choice([*differing(right, wrong, values)])
    return sorted([one, *rng.sample([value for value in values if value != one], count - 1)])
