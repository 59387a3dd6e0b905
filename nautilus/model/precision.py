"""Training in few bits: how a matrix multiplies now, and with which random bits.

`lower.py` hands every matrix that the table names a `Site`; the matrix asks it, in training, how to multiply. What that
depends on is the same for the whole model and moves with the step: `Lowered`, which `fit` tells of every step and every
micro-batch. All of it follows from the table, the seed, the step and the tokens seen, so there is nothing to save.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nautilus.config import PrecisionTable
from nautilus.ops.low_precision import BLOCK, USES, How


@dataclass(eq=False)
class Lowered:
    """Where a model trained in few bits stands. Without `begin` every step would draw the same random bits."""

    table: PrecisionTable
    seed: int = 0
    step: int = 0
    row: int = 0  # how many rows the earlier micro-batches of this step had, each rounded up to whole blocks
    recipe: str = "table"
    flushed: dict[str, list[int]] | None = (
        None  # while watched: (numbers that became zero, numbers) by role and operand
    )

    def begin(self, step: int, tokens: int, *, watched: bool = False) -> None:
        """Before a step, of a run that has seen so many tokens. watched: count for `flush_rates`."""
        self.step, self.row, self.recipe = step, 0, self.table.recipe_at(tokens)
        self.flushed = {} if watched else None

    def passed(self, rows: int) -> None:
        """After a micro-batch of so many tokens."""
        self.row += -(-rows // BLOCK) * BLOCK

    def flush_rates(self) -> dict[str, float]:
        """`flush.<role>.<operand>`: the share of numbers that rounding made zero in this step so far."""
        return {f"flush.{name}": zeros / count for name, (zeros, count) in sorted((self.flushed or {}).items())}


@dataclass(eq=False)
class Site:
    """What one module knows of it."""

    role: str
    format: str
    number: int  # of the module, for its random bits
    model: Lowered = field(repr=False)

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
            row=now.row,
            watch=None if now.flushed is None else self.count,
        )

    def count(self, operand: str, zeros: int, numbers: int) -> None:
        if self.model.flushed is not None:
            sums = self.model.flushed.setdefault(f"{self.role}.{operand}", [0, 0])
            sums[0] += zeros
            sums[1] += numbers
