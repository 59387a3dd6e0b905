"""Rows that begin alike, as answers to one prompt do: what they share is computed once, and so is its gradient.

The first `batch.common` columns of rows with equal numbers in `batch.alike` pass through the model once. Each row then
goes on from the state after them: keys and values, convolution tails and recurrent states, through which the gradients
of all rows come back. The numbers are those of whole rows, up to the order in which gradients are added; statistics of
the experts see what is shared once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.train.replay import replaying


def hidden_of(model: Language, batch: Batch) -> Tensor:
    """(B, T, D) of the batch's rows, by the experts that wrote its tokens where these are known."""
    whole = slice(None), slice(None)
    if batch.alike is None or model.checkpointing or model.chunk:  # which keep no state to go on from
        return through(model, batch, whole)[0]
    numbers, row_B = batch.alike.unique(return_inverse=True)
    first_G = torch.full_like(numbers, len(batch)).scatter_reduce_(
        0, row_B, torch.arange(len(batch), device=row_B.device), "amin"
    )
    shared_GCD, state = through(model, batch, (first_G, slice(batch.common)))
    own_BTD, _ = through(model, batch, (slice(None), slice(batch.common, None)), state.rows(row_B))
    return torch.cat([shared_GCD.index_select(0, row_B), own_BTD], 1)


def through(model: Language, batch: Batch, part, state=None):
    """Of some rows and columns of the batch."""
    document = None if batch.document is None else batch.document[part]
    with replaying(model, None if batch.routes is None else batch.routes[part]):
        return model.hidden(batch.tokens[part], state=state, document_BT=document)
