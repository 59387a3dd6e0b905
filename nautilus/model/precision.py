"""Training in few bits: how a matrix multiplies now, and with which random bits.

`lower.py` hands every matrix that the table names a `Site`; the matrix asks it, in training, how to multiply. What that
depends on is the same for the whole model and moves with the step: `Lowered`, which `fit` tells of every step and every
micro-batch. All of it follows from the table, the seed, the step and the tokens seen, so there is nothing to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nautilus.config import PrecisionTable
from nautilus.ops.low_precision import BLOCK, USES, How, Piece

Flushed = dict[str, list[int]]  # (numbers that became zero, numbers) by role and operand


def whole_blocks(rows: int) -> int:
    return -(-rows // BLOCK) * BLOCK


def rows_taken(rows: int, time: int, piece: int) -> int:
    """Addresses that a micro-batch takes whose rows are computed in pieces of so many tokens: whole blocks of each."""
    full, rest = divmod(time, piece)
    return full * whole_blocks(rows * piece) + whole_blocks(rows * rest)


@dataclass(eq=False)
class Lowered:
    """Where a model trained in few bits stands. Without `begin` every step would draw the same random bits."""

    table: PrecisionTable
    seed: int = 0
    step: int = 0
    row: int = (
        0  # how many rows come before the micro-batch that goes forward or backward now, each one's in whole blocks
    )
    before: int = 0  # and how many of this micro-batch's come before those that are computed now
    recipe: str = "table"
    flushed: Flushed | None = None  # while watched

    def begin(self, step: int, tokens: int, *, row: int = 0, watched: bool = False) -> None:
        """Before a step, of a run that has seen so many tokens. row: where its rows begin that are computed here.
        watched: count for `flush_rates`."""
        self.step, self.row, self.recipe = step, row, self.table.recipe_at(tokens)
        self.flushed = {} if watched else None

    @contextlib.contextmanager
    def behind(self, rows: int) -> Iterator[None]:
        """Inside, what is computed stands behind so many rows more of the micro-batch."""
        self.before += rows
        try:
            yield
        finally:
            self.before -= rows

    def flush_rates(self, gathered: Callable[[Flushed], list[Flushed]] = lambda own: [own]) -> dict[str, float]:
        """`flush.<role>.<operand>`: the share of numbers that rounding made zero in this step so far.

        gathered: the counts of all processes, given those of this one.
        """
        sums: Flushed = {}
        for name, pair in (item for each in gathered(self.flushed or {}) for item in each.items()):
            sums[name] = [total + own for total, own in zip(sums.get(name, [0, 0]), pair, strict=True)]
        return {f"flush.{name}": zeros / count for name, (zeros, count) in sorted(sums.items())}


@dataclass(eq=False)
class Site:
    """What one module knows of it."""

    role: str
    format: str
    number: int  # of the module, for its random bits
    model: Lowered = field(repr=False)
    piece: Piece | None = None  # of the matrix, where several processes hold it

    def how(self, training: bool) -> How | None:
        """How to multiply now; None: in the model's own dtype, as always outside of training."""
        now = self.model
        if now.recipe == "bf16" or not training:
            return None
        return How(
            format="mxfp8" if now.recipe == "mxfp8" else self.format,
            forward=now.recipe != "table_backward",
            rotate=now.table.rotate,
            stochastic=now.table.stochastic,
            square=now.table.square,
            seed=now.seed,
            step=now.step,
            stream=self.number * USES,
            row=now.row + now.before,
            piece=self.piece,
            watch=None if now.flushed is None else self.count,
        )

    def count(self, operand: str, zeros: int, numbers: int) -> None:
        if self.model.flushed is not None:
            sums = self.model.flushed.setdefault(f"{self.role}.{operand}", [0, 0])
            sums[0] += zeros
            sums[1] += numbers
