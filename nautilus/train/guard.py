"""When training goes wrong: the state before, without the text in between.

A step is a spike if its loss or its gradient is no number, or if either exceeds `spike` times its median over the last
`window` steps. Its update is not made. What was seen goes into incidents.jsonl of the run, the run returns to its
newest sound state, and the stream goes on behind the offending step: no text since that state is seen again. What is
watched is of all processes, so that all of them go back alike. (Ultra went back to an earlier checkpoint twice, arXiv
2606.15007; PaLM skipped the batches around each spike, arXiv 2204.02311.)
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from nautilus.config import setting
from nautilus.data.batch import Batch
from nautilus.runtime import UserError, read_metrics, write_atomic
from nautilus.train.ranks import Ranks
from nautilus.train.sums import Sums

WATCHED = ("loss", "grad_norm")
LEAST = 8  # steps, before which a median says too little


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What counts as a spike, and how often a run may go back because of one."""

    spike: float = setting(0.0, "loss or gradient norm over this many medians is a spike, 0: only what is no number")
    window: int = setting(64, "steps that the median is taken over")
    rollbacks: int = setting(0, "times that a run may go back to its last state and skip the text since, 0: stop")

    def __post_init__(self):
        if self.spike and not self.spike > 1:
            raise ValueError(f"guard.spike={self.spike} must be 0 (off) or above 1; 3 is usual")
        if self.window < LEAST or self.rollbacks < 0:
            raise ValueError(
                f"guard.window={self.window} must be at least {LEAST} and guard.rollbacks={self.rollbacks} at least 0"
            )


class Spike(UserError):
    """A step whose update must not be made. `step` and `batches`: which one, and the marks of what it was fed."""

    def __init__(self, message: str, step: int, batches: list[str], found: dict[str, float]):
        super().__init__(message)
        self.step, self.batches, self.found = step, batches, found


@dataclass
class Watch:
    """The last losses and gradient norms, and whether the next ones are out of line with them."""

    guard: Guard = Guard()
    last: dict[str, deque[float]] = field(init=False)

    def __post_init__(self):
        self.last = {name: deque(maxlen=self.guard.window) for name in WATCHED}

    def refill(self, rows: Iterable[dict], before: int) -> None:
        """Start from what the metrics say of the steps before `before`, so that resuming changes no verdict."""
        self.__post_init__()
        for row in rows:
            if row["step"] < before:
                self.add(row)

    def add(self, metrics: dict) -> None:
        for name, values in self.last.items():
            if isinstance(metrics.get(name), float):
                values.append(metrics[name])

    def fault(self, found: dict[str, float]) -> str:
        """Why a step with these values is a spike; empty if it is none."""
        if not self.guard.spike:
            return ""
        for name, values in self.last.items():
            if len(values) < LEAST:
                continue
            usual = statistics.median(values)
            if found[name] > self.guard.spike * usual:
                return f"{name} {found[name]:.4g} is over guard.spike={self.guard.spike:g} times its median {usual:.4g}"
        return ""

    def refuse(self, step: int, found: dict[str, float], batches: list[str]) -> None:
        """Raises a Spike if the values of this step are one."""
        if fault := self.fault(found):
            raise Spike(
                f"training stopped at step {step}: {fault} (batches {', '.join(batches)}). This update was not made "
                f"and the last saved state is untouched; raise guard.spike, or let the run go back: guard.rollbacks=3",
                step,
                batches,
                found,
            )


def each_once(lists: Iterable[list[str]]) -> list[str]:
    """What several processes name."""
    return [*dict.fromkeys(word for words in lists for word in words)]


def incidents(path: Path) -> list[dict]:
    """What went wrong in a run so far, oldest first."""
    return read_metrics(path)


def note(path: Path, spike: Spike, back_to: int, rows: tuple[object, object]) -> None:
    """One line: the step, what was seen, the batches it was fed, where training goes on and which rows it skips."""
    found = {name: value if math.isfinite(value) else str(value) for name, value in spike.found.items()}
    line = {"step": spike.step, "why": str(spike), **found, "batches": spike.batches, "back_to": back_to}
    line |= {"skipped": {"from": rows[0], "to": rows[1]}}
    write_atomic(path, "".join(json.dumps(each) + "\n" for each in [*incidents(path), line]))


def endure(guard: Guard, path: Path, so_far: list[dict], spike: Spike) -> None:
    """Raises the spike where it may not, or not any more, be answered by going back. so_far: the incidents in path."""
    if len(so_far) < guard.rollbacks:
        return
    if not guard.rollbacks:
        raise spike
    steps = ", ".join(str(one["step"]) for one in so_far)
    raise UserError(
        f"{spike}. The run has gone back guard.rollbacks={guard.rollbacks} times before (spikes at steps {steps}; see "
        f"{path}); lower the rate, start the decay with anneal=, or raise guard.rollbacks"
    ) from spike


def divergence(
    model: nn.Module, ranks: Ranks, step: int, batches: list[Batch], sums: Sums, marks: list[str]
) -> str:  # fmt: skip
    """The message for a loss or gradient that is no number, the same on all processes."""
    bad = [i for i, loss in enumerate(sums.losses) if not torch.isfinite(loss)]
    terms = ", ".join(f"{name}={(pair[0] / pair[1]).item():.4g}" for name, pair in sums.pairs.items())
    found = [
        f"({terms}) in micro-batch {i + 1} of {len(batches)} "
        f"(batch {batches[i].fingerprint}, {tuple(batches[i].tokens.shape)} tokens)"
        for i in bad[:1]
    ]
    if losses := each_once(ranks.gather(found)):
        what, where = f"the loss is not finite {losses[0]}", ""
    else:
        bad_names = [
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not ranks.own(p.grad).isfinite().all()
        ]
        names = each_once(ranks.gather(bad_names))
        what = f"the loss is finite but the gradient is not, in {', '.join(names[:4])}"
        where = f" ({len(names)} parameters; batches {', '.join(marks)})"
    return (
        f"training stopped at step {step}: {what}{where}. This update was not made and the last saved state is "
        f"untouched; lower the learning rate, look at that data, or resume from an earlier state"
    )
