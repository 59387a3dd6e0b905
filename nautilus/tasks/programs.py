"""Programs as answers: taken out of what was said, and run on what they should give."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nautilus.tasks.sandbox import Bounds, run_python
from nautilus.tasks.task import GraderBroken, Verdict

FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
MOST, USUAL = 50, Bounds()  # tests that are run, and what each may take


def program_of(answer: str) -> str:
    """The last fenced block, or all of it where there is none."""
    found = FENCED.findall(answer)
    return found[-1] if found else answer


def passes(answer: str, inputs: Sequence[str], outputs: Sequence[str], bounds: Bounds = USUAL) -> Verdict:
    """1 if the program prints each output for its input, but for white space at line ends. GraderBroken for tests that
    are none, and where there is no sandbox."""
    if not inputs or len(inputs) != len(outputs) or not all(isinstance(one, str) for one in (*inputs, *outputs)):
        raise GraderBroken(f"the problem has {len(inputs)} inputs and {len(outputs)} outputs; each needs the other")
    program = program_of(answer)
    for number, (given, wanted) in enumerate(zip(inputs[:MOST], outputs[:MOST], strict=True)):
        ran = run_python(program, given=given, bounds=bounds)
        if ran.code is None:
            return Verdict(reward=0.0, why=f"test {number + 1} took more than {bounds.seconds:g} seconds")
        if ran.code:
            last = ran.err.strip().splitlines()[-1:] or ["no words"]
            return Verdict(reward=0.0, why=f"test {number + 1} ended with {ran.code}: {last[0][:200]}")
        if lines(ran.out) != lines(wanted):
            return Verdict(reward=0.0, why=f"test {number + 1} gave another output")
    return Verdict(reward=1.0, why=f"all of {min(MOST, len(inputs))} tests passed")


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
