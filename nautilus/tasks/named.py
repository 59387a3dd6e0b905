"""The procedural tasks by name."""

from __future__ import annotations

from collections.abc import Callable

from nautilus.tasks.agents import Repair, Store
from nautilus.tasks.arithmetic import Arithmetic, Calculator, Derivative
from nautilus.tasks.forms import Constraints, Fields, Forbidden
from nautilus.tasks.judging import Judge
from nautilus.tasks.knowing import Abstain, Choice, Needle
from nautilus.tasks.letters import Count, Reverse, Rotate, Sort
from nautilus.tasks.style import Style
from nautilus.tasks.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    kind.name: kind
    for kind in (
        Arithmetic, Calculator, Derivative, Sort, Reverse, Rotate, Count, Store, Repair, Fields, Constraints, Forbidden,
        Needle, Choice, Abstain, Style, Judge,
    )
}  # fmt: skip
