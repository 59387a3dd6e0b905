"""Decode states of recorded answers as rows to learn from. Letters: N rows, F features, G lengths of the grid."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nautilus.posttrain.replay import Policy, replay
from nautilus.posttrain.traces import Trace
from nautilus.runtime import UserError
from nautilus.serve.draft.features import NAMES, Spelling

COLUMNS = "features", "true", "length", "number", "cycle", "weight"
MANY, ZEROS = 50_000, 0.25  # rows from which on, and which share of those without a true token are kept


@dataclass(frozen=True, kw_only=True)
class Rows:
    """features (N, F); true: draft tokens that came true, of `length`; number: of the trace; cycle: whether a cycle
    began there; weight: how many rows it stands for. positions, cycles: of all, also those without a draft."""

    features: np.ndarray
    true: np.ndarray
    length: np.ndarray
    number: np.ndarray
    cycle: np.ndarray
    weight: np.ndarray
    positions: int
    cycles: int

    def __len__(self) -> int:
        return len(self.true)

    def of(self, keep: np.ndarray) -> Rows:
        return replace(self, **{name: getattr(self, name)[keep] for name in COLUMNS})

    def among(self, numbers: Container[int]) -> Rows:
        return self.of(np.array([number in numbers for number in self.number.tolist()], bool))

    def thinned(self, seed: int) -> Rows:
        """Of many rows: all with a true token, and some of the others, which then weigh more."""
        if len(self) < MANY:
            return self
        empty = self.true == 0
        keep = ~empty | (np.random.default_rng(seed).random(len(self)) < ZEROS)
        return replace(self, weight=np.where(empty, self.weight / ZEROS, self.weight).astype(np.float32)).of(keep)


def rows_of(
    traces: Sequence[Trace], policy: Policy, spelling: Spelling, *, most: int, of: Container[int], every: bool = False
) -> Rows:
    """The states of these traces in which there is a draft: those where a cycle begins under the policy, or every."""
    features, facts, positions, cycles = [], [], 0, 0
    for moment, choice in replay(traces, policy, spelling, most=most, of=of, every=every):
        positions += 1
        cycles += choice is not None
        if moment.copied is not None:
            features.append(moment.features())
            facts.append((moment.true, moment.length, moment.number, choice is not None))
    true, length, number, cycle = np.array(facts, np.int64).reshape(-1, 4).T
    return Rows(
        features=np.array(features, np.float32).reshape(-1, len(NAMES)), true=true, length=length, number=number,
        cycle=cycle.astype(bool), weight=np.ones(len(facts), np.float32), positions=positions, cycles=cycles,
    )  # fmt: skip


def joined(parts: Sequence[Rows]) -> Rows:
    positions, cycles = (sum(getattr(part, name) for part in parts) for name in ("positions", "cycles"))
    together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Rows(**together, positions=positions, cycles=cycles)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Numbers of the traces that are trained on, calibrated on, and reported on."""

    train: frozenset[int]
    calibrate: frozenset[int]
    test: frozenset[int]


def split(traces: Sequence[Trace], seed: int) -> Parts:
    """By group, so that nothing is reported on that was trained on: about 70, 15 and 15 %. UserError for too few."""
    groups: dict[str, list[int]] = {}
    for number, trace in enumerate(traces):
        groups.setdefault(trace.group or f"number {number}", []).append(number)
    if len(groups) < 3:
        raise UserError(
            f"there are answers to {len(groups)} different prompts; a predictor needs 3 at least, give more"
        )
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    few = max(1, math.floor(0.15 * len(names)))
    cuts = names[2 * few :], names[few : 2 * few], names[:few]
    train, calibrate, test = (frozenset(number for name in cut for number in groups[name]) for cut in cuts)
    return Parts(train=train, calibrate=calibrate, test=test)
