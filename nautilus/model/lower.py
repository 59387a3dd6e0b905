"""A model made to train in few bits: its matrices are told which of them, by a table of roles."""

from __future__ import annotations

import torch

from nautilus.config import Config, PrecisionTable
from nautilus.model.language import Language
from nautilus.model.layout import role
from nautilus.model.linear import Linear
from nautilus.model.moe import ExpertWeights
from nautilus.model.precision import Lowered, Site
from nautilus.ops.low_precision import How, Piece, low_linear
from nautilus.runtime import UserError

MOST = 16  # matrices of a layer, so that a matrix's number follows from its place alone


def lower(model: Language, table: PrecisionTable, *, seed: int = 0) -> Language:
    """The model, whose matrices that the table names multiply in few bits while it trains; none, if the table is off.

    seed: of stochastic rounding. ValueError where the probe finds that rounding gives zeros. A matrix has the same
    number, and so the same random bits, under every table. Of a model shared out among processes: after it is.
    UserError where their pieces cut blocks.
    """
    model.lowered = Lowered(table=table, seed=seed) if table.on else None
    if model.lowered is not None:
        probe()
    for index, block in enumerate(model.backbone.layers):
        modules = [
            (name, module) for name, module in block.named_modules() if isinstance(module, Linear | ExpertWeights)
        ]
        for number, (name, module) in enumerate(modules, index * MOST):
            lower_one(f"backbone.layers.{index}.{name}", module, number, model, table)
    return model


def lower_one(name: str, module: Linear | ExpertWeights, number: int, model: Language, table: PrecisionTable) -> None:
    format = format_of(name, model.config, table)
    lowered = model.lowered if format != "bf16" else None
    piece = module.piece if isinstance(module, Linear) else None
    if lowered is not None and piece is not None:
        refuse_cut_blocks(name, piece, table, format)
    module.site = None if lowered is None else Site(role(name, model.config), format, number, lowered, piece)


def refuse_cut_blocks(name: str, piece: Piece, table: PrecisionTable, format: str) -> None:
    """A UserError where a block of numbers under one scale would lie on two processes."""
    eights = "mxfp8" in (format, *(recipe.name for recipe in table.recipes))
    block = 32 if eights else 16
    if bad := sorted({length for length in piece.lengths if length % block}):
        raise UserError(
            f"precision.format={table.format} with layout.tp: a process would hold {', '.join(map(str, bad))} of the "
            f"{piece.axis} of a part of {name}, which cuts blocks of {block} numbers under one scale; lower layout.tp, "
            f"choose sizes that leave multiples of {block}, or leave that matrix in bf16"
        )


def format_of(name: str, config: Config, table: PrecisionTable) -> str:
    """Of the matrix, or the stack of them, that a module of this name holds."""
    parts = name.split(".")
    if parts[:2] != ["backbone", "layers"] or not table.lowered(int(parts[2]), len(config.layers)):
        return "bf16"
    return table.format_of(role(name, config))


def probe() -> None:
    """A known gradient through both products of the backward; stochastic rounding was seen to give zeros only on some
    devices."""
    x = torch.linspace(-1, 1, 32 * 16).view(32, 16).bfloat16().requires_grad_()
    weight = torch.linspace(1, -2, 32 * 16).view(32, 16).requires_grad_()
    low_linear(x, weight, How(format="nvfp4")).backward(torch.full((32, 32), 2.0**-10).bfloat16())
    for name, gradient in (("inputs", x.grad), ("weights", weight.grad)):
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise ValueError(
                f"training in nvfp4: the gradient of the {name} of a known product is zero or no number here; train in "
                f"bf16, or force the reference with NAUTILUS_OPS=reference and report it"
            )
