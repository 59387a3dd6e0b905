"""Log-probs and cross entropy without ever holding the logits of a whole batch.

Letters: R rows (tokens), D width, V vocabulary. Logits and their softmax are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import wide

ROWS = 512  # logits held at a time: 512 rows of a 131,072-word vocabulary are 256 MiB


@checked
def token_logprob(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    """log softmax(hidden @ weight^T)[target], shape (R,). The backward computes the logits a second time."""
    return choose("token_logprob", LOGPROB_IMPLS, hidden_RD)(hidden_RD, weight_VD, target_R)


def token_logprob_reference(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    logits_RV = (hidden_RD @ weight_VD.to(hidden_RD.dtype).T).to(wide(hidden_RD.dtype))
    return logits_RV.log_softmax(-1).gather(-1, target_R[:, None])[:, 0]


def token_logprob_chunked(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    return TokenLogprob.apply(hidden_RD, weight_VD, target_R)


@checked
def weighted_nll(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
    """-sum_r weight_r log p(target_r), a scalar. Rows of weight 0 cost nothing.

    The gradient is taken while the logits are at hand, so each logit is computed once; use `token_logprob` where the
    gradient of every row is needed on its own.
    """
    return choose("weighted_nll", NLL_IMPLS, hidden_RD)(hidden_RD, weight_VD, target_R, weight_R)


def weighted_nll_reference(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
    return -(token_logprob_reference(hidden_RD, weight_VD, target_R) * weight_R).sum()


def weighted_nll_chunked(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
    used = weight_R.nonzero()[:, 0]
    if used.shape[0] < weight_R.shape[0]:
        hidden_RD, target_R, weight_R = hidden_RD[used], target_R[used], weight_R[used]
    return WeightedNll.apply(hidden_RD, weight_VD, target_R, weight_R)


def chunk_logprob(hidden_RD: Tensor, matrix_VD: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob of each target, log-softmax of all words) for one chunk of rows."""
    logits_RV = torch.mm(hidden_RD, matrix_VD.T).to(wide(hidden_RD.dtype))
    logprob_RV = torch.log_softmax(logits_RV, -1)
    return logprob_RV.gather(-1, target_R[:, None])[:, 0], logprob_RV


def logit_gradient(logprob_RV: Tensor, target_R: Tensor, push_R: Tensor) -> Tensor:
    """push * (one-hot(target) - softmax), overwriting `logprob_RV`."""
    gradient = logprob_RV.exp_().mul_(-push_R[:, None])
    return gradient.scatter_add_(-1, target_R[:, None], push_R[:, None].to(gradient.dtype))


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R):
        ctx.save_for_backward(hidden_RD, weight_VD, target_R)
        matrix = weight_VD.to(hidden_RD.dtype)
        parts = [chunk_logprob(h, matrix, t)[0] for h, t in zip(hidden_RD.split(ROWS), target_R.split(ROWS), strict=True)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, push_R):  # type: ignore[override]
        hidden_RD, weight_VD, target_R = ctx.saved_tensors
        matrix, total = weight_VD.to(hidden_RD.dtype), torch.zeros_like(weight_VD, dtype=wide(hidden_RD.dtype))
        dhidden = []
        for h, t, p in zip(hidden_RD.split(ROWS), target_R.split(ROWS), push_R.split(ROWS), strict=True):
            dlogits = logit_gradient(chunk_logprob(h, matrix, t)[1], t, p).to(h.dtype)
            dhidden.append(dlogits @ matrix)
            total += dlogits.T @ h
        return torch.cat(dhidden), total.to(weight_VD.dtype), None


class WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R, weight_R):
        matrix, dtype = weight_VD.to(hidden_RD.dtype), wide(hidden_RD.dtype)
        needed = any(ctx.needs_input_grad[:2])
        loss, dhidden = hidden_RD.new_zeros((), dtype=dtype), torch.empty_like(hidden_RD) if needed else None
        dmatrix = torch.zeros_like(weight_VD, dtype=dtype) if needed else None
        for begin in range(0, hidden_RD.shape[0], ROWS):
            rows = slice(begin, begin + ROWS)
            hidden, target, weight = hidden_RD[rows], target_R[rows], weight_R[rows].to(dtype)
            logprob_R, logprob_RV = chunk_logprob(hidden, matrix, target)
            loss -= torch.dot(logprob_R, weight)
            if dhidden is not None and dmatrix is not None:
                dlogits = logit_gradient(logprob_RV, target, -weight).to(hidden.dtype)
                torch.mm(dlogits, matrix, out=dhidden[rows])
                dmatrix += dlogits.T @ hidden
        ctx.save_for_backward(dhidden, dmatrix)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx, push):  # type: ignore[override]
        dhidden, dmatrix = ctx.saved_tensors
        return (dhidden * push.to(dhidden.dtype)), (dmatrix * push).to(ctx.dtypes[1]), None, None


LOGPROB_IMPLS = (Impl("torch", token_logprob_chunked), Impl("reference", token_logprob_reference))
NLL_IMPLS = (Impl("torch", weighted_nll_chunked), Impl("reference", weighted_nll_reference))
