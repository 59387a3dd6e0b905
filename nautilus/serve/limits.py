"""What an engine may be asked to be, and what its requests are told when it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from nautilus.model.language import Language
from nautilus.ops.cpu.mamba import CHUNK
from nautilus.runtime import UserError
from nautilus.serve.sampling import whole


def engine_failed(bad: Exception) -> RuntimeError:
    """What a request ends with that is not to blame for what went wrong."""
    error = RuntimeError("the engine failed at this request; its log has the details")
    error.__cause__ = bad
    return error


def checked_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """UserError for other names or shapes than a model's own."""
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            has = f"has them of {tuple(own[name].shape)}" if name in own else f"names none so of its {len(own)}"
            raise UserError(
                f"new weights {name} of shape {tuple(tensor.shape)} were given; the model {has}; give those of its"
                " state_dict, where matrices in few bits are not"
            )


def checked_limits(
    model: Language, max_tokens: int | None, rows: int, chunk: int, drafts: int, step_seconds: float, amounts: Mapping
) -> int:
    """The most tokens of a request. UserError for a limit that cannot be."""
    positions = model.config.positions
    max_tokens = positions if max_tokens is None else max_tokens
    if not whole(max_tokens) or not 1 < max_tokens <= positions:
        raise UserError(
            f"an engine of max_tokens={max_tokens} was asked for; the model has positions={positions}: "
            f"choose from 2 to {positions}"
        )
    if not whole(rows) or not whole(chunk) or rows < 1 or chunk < 1:
        raise UserError(f"an engine of rows={rows} and chunk={chunk} was asked for; both must be whole numbers from 1")
    if not whole(drafts) or not 0 <= drafts < CHUNK:
        raise UserError(f"an engine of drafts={drafts} was asked for; give a whole number from 0 to {CHUNK - 1}")
    for name, amount in (*amounts.items(), ("step_seconds", step_seconds)):
        if amount is not None and (not amount >= 0 or (name != "step_seconds" and amount == math.inf)):
            raise UserError(f"an engine of {name}={amount} was asked for; give a number from 0")
    return max_tokens
