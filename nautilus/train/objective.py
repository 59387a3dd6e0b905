"""What to minimise. A stage is a stream of batches and one of these.

An objective maps (model, batch) to named (sum, count) pairs, the terms, and to further pairs that are only watched. It
never divides. `fit` divides every sum by its count over all micro-batches of the step and all ranks:

    loss = sum over terms of coefficient * (sum / count)

so a token has the same say however the step is cut. The count of a term is the sum of `batch.weights[term]`: it depends
on the batch alone and is known before the first forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nautilus.data.batch import Batch
from nautilus.model.language import Language

Pairs = dict[str, tuple[Tensor, Tensor]]
Terms = Callable[[Language, Batch], tuple[Pairs, Pairs]]


def as_given(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Objective:
    """A function of (model, batch) with what `fit` must know beside it; `fit` also takes the bare function.

    The terms are raw sums and are logged as such: `coefficients` (1 where none is given) enter the loss only. `weigh`
    adds the weights of terms that follow from others; it must depend on the batch alone.
    """

    terms: Terms
    coefficients: Mapping[str, float] = field(default_factory=dict)
    weigh: Callable[[Batch], Batch] = as_given

    def __call__(self, model: Language, batch: Batch) -> tuple[Pairs, Pairs]:
        return self.terms(model, self.weigh(batch))


def next_token(model: Language, batch: Batch) -> tuple[Pairs, Pairs]:
    """Cross entropy: minus log p of each target token."""
    hidden_BTD, _ = model.hidden(batch.tokens, document_BT=batch.document)
    return {"next_token": prediction(model, hidden_BTD, batch, "next_token", ahead=1)} if model.ends else {}, {}


def pretrain(*, mtp_depths: int = 0, mtp_weight: float = 0.3, aux_weight: float = 0.0) -> Objective:
    """Next token, multi-token prediction and the routers' sequence balance loss.

        L = L_next + mtp_weight / depths * (L_1 + ... + L_depths) + aux_weight * L_balance

    L_k is the mean over its own targets of minus log p of the token k+1 ahead (terms mtp_1, mtp_2, ...; Nemotron 3
    Super: 2 depths, weight 0.3; Ultra: 0.1). L_balance is the sum over routers of a mean over rows (published: 1e-4).
    """
    if mtp_depths < 0 or mtp_weight < 0 or aux_weight < 0:
        raise ValueError(
            f"pretrain was asked for mtp_depths={mtp_depths}, mtp_weight={mtp_weight}, aux_weight={aux_weight}; "
            f"none may be negative, 0 leaves a term out"
        )
    settings = {"depths": mtp_depths, "balance": aux_weight > 0}
    coefficients = {f"mtp_{k}": mtp_weight / mtp_depths for k in range(1, mtp_depths + 1)} | {"balance": aux_weight}
    return Objective(partial(pretrain_terms, **settings), coefficients, partial(pretrain_weights, **settings))


def pretrain_terms(model: Language, batch: Batch, *, depths: int, balance: bool) -> tuple[Pairs, Pairs]:
    model.collect_balance(balance)
    hidden_BTD, _ = model.hidden(batch.tokens, document_BT=batch.document)
    terms = predictions(model, hidden_BTD, batch, depths) if model.ends else {}
    if totals := take_balance_losses(model):
        terms["balance"] = (torch.stack(totals).sum(), batch.weights["balance"].sum())
    return terms, {}


def predictions(model: Language, hidden_BTD: Tensor, batch: Batch, depths: int) -> Pairs:
    terms = {"next_token": prediction(model, hidden_BTD, batch, "next_token", ahead=1)}
    if depths:
        deeper = model.mtp_hidden(hidden_BTD, batch.tokens, depths, document_BT=batch.document)
        for k, deep_BTD in enumerate(deeper, 1):
            terms[f"mtp_{k}"] = prediction(model, deep_BTD, batch, f"mtp_{k}", ahead=1 + k)
    return terms


def pretrain_weights(batch: Batch, *, depths: int, balance: bool) -> Batch:
    extra = {f"mtp_{k}": depth_weights(batch, k) for k in range(1, depths + 1)}
    if balance:
        extra["balance"] = first_of_row(batch)
    return dataclasses.replace(batch, weights=batch.weights | extra)


def prediction(model: Language, hidden_BTD: Tensor, batch: Batch, term: str, *, ahead: int) -> tuple[Tensor, Tensor]:
    """(sum of -w log p(token t), sum of w), token t being read off the hidden state `ahead` positions before it."""
    weight_BT = batch.weights[term][:, ahead:]
    total = model.nll(hidden_BTD[:, :-ahead].flatten(0, 1), batch.tokens[:, ahead:].flatten(), weight_BT.flatten())
    return total, weight_BT.sum()


def depth_weights(batch: Batch, depth: int, term: str = "next_token") -> Tensor:
    """The weight, in this term, of each target that depth `depth` can predict, 0 elsewhere. Shape (B, T).

    Target t is predicted from position t-1-depth, which must exist and lie in the same document.
    """
    weight_BT = batch.weights[term].clone()
    weight_BT[:, : depth + 1] = 0
    if batch.document is not None:
        begins_BT = torch.zeros_like(batch.document)
        begins_BT[:, 1:] = batch.document[:, 1:] != batch.document[:, :-1]
        serial_BT = begins_BT.cumsum(1)  # numbers may come back in a row; serial ones do not
        crosses_BT = serial_BT[:, depth + 1 :] != serial_BT[:, : -(depth + 1)]
        weight_BT[:, depth + 1 :].masked_fill_(crosses_BT, 0)
    return weight_BT


def first_of_row(batch: Batch) -> Tensor:
    """1 for the first token of each row that is not all padding (document 0), for a term that counts rows."""
    weight_BT = torch.zeros_like(batch.weights["next_token"])
    weight_BT[:, 0] = 1.0 if batch.document is None else (batch.document != 0).any(1).to(weight_BT.dtype)
    return weight_BT


def take_balance_losses(model: Language) -> list[Tensor]:
    """What the routers left, which is then forgotten: it would keep the forward's graph alive."""
    totals = [total for total, _ in model.auxiliary]
    model.collect_balance(False)
    return totals
