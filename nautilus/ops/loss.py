"""Log-probs and cross entropy without ever holding the logits of a whole batch.

Letters: R rows (tokens), D width, V vocabulary. Logits and their softmax are float32 (float64 for float64 input).

A matrix may hold some words of a vocabulary whose others lie elsewhere (`Words`). Then V is what is here, and all
holders call together: of a chunk of logits only three numbers a row are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.formats import Packed
from nautilus.ops.linear import linear, native_refuses
from nautilus.ops.peak import peak
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import wide

ELEMENTS = 1 << 21  # logits held at a time in float32: 8 MiB, which stays in a shared cache
HELD = 1 << 26  # logit gradients kept for one matmul with the hidden states: at most this many elements


@dataclass(frozen=True)
class Words:
    """The matrix holds the words first .. first + V - 1 only.

    largest, added: over all holders, element by element. Gradients pass through `added` as they are, since what it
    gives is used alike by all.
    """

    first: int
    largest: Callable[[Tensor], Tensor]
    added: Callable[[Tensor], Tensor]


def rows_for(elements: int, vocabulary: int) -> int:
    """Rows of logits that make up about `elements` numbers; at least 16."""
    return max(16, elements // vocabulary)


@checked
def token_logprob(hidden_RD: Tensor, weight_VD: Tensor | Packed, target_R: Tensor) -> Tensor:
    """log softmax(hidden @ weight^T)[target], shape (R,). The backward computes the logits a second time. On the native
    path it is what an engine tells of a token that it drew, bit for bit."""
    if isinstance(weight_VD, Packed):
        weight_VD = weight_VD.decode(hidden_RD.dtype)
    return choose("token_logprob", LOGPROB_IMPLS, hidden_RD, weight_VD, target_R)(hidden_RD, weight_VD, target_R)


def token_logprob_reference(
    hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, words: Words | None = None
) -> Tensor:
    logits_RV = (hidden_RD @ weight_VD.to(hidden_RD.dtype).T).to(wide(hidden_RD.dtype))
    return logprob_of(logits_RV, target_R, words)


def logprob_of(logits_RV: Tensor, target_R: Tensor, words: Words | None) -> Tensor:
    if words is None:
        return logits_RV.log_softmax(-1).gather(-1, target_R[:, None])[:, 0]
    index_R1, here_R1 = own_words(target_R, logits_RV, words)
    logits_RV = logits_RV - words.largest(logits_RV.detach().amax(-1, keepdim=True))
    own = torch.stack([logits_RV.exp().sum(-1, keepdim=True), logits_RV.gather(-1, index_R1) * here_R1])
    sum_R1, target_R1 = words.added(own)
    return (target_R1 - sum_R1.log())[:, 0]


def own_words(target_R: Tensor, logits_RV: Tensor, words: Words | None) -> tuple[Tensor, Tensor]:
    """The column of each target and 1; where another holds the target, some column and 0."""
    if words is None:
        return target_R[:, None], logits_RV.new_ones(len(target_R), 1)
    index_R1 = target_R[:, None] - words.first
    here_R1 = (index_R1 >= 0) & (index_R1 < logits_RV.shape[1])
    return index_R1.where(here_R1, 0), here_R1.to(logits_RV.dtype)


def token_logprob_chunked(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    return TokenLogprob.apply(hidden_RD, weight_VD, target_R, False)


def token_logprob_native(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> Tensor:
    return TokenLogprob.apply(hidden_RD, weight_VD, target_R, True)


def token_logprob_native_refuses(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> str | None:
    return native_refuses(hidden_RD, weight_VD, wide=True)


@checked
def weighted_nll(
    hidden_RD: Tensor, weight_VD: Tensor | Packed, target_R: Tensor, weight_R: Tensor, words: Words | None = None
) -> Tensor:
    """-sum_r weight_r log p(target_r), a scalar. Rows of weight 0 cost nothing.

    The gradient is taken while the logits are at hand, so each logit is computed once; use `token_logprob` where the
    gradient of every row is needed on its own. With `words` every holder gets the whole loss, and of the hidden states
    the part of the gradient that its own words give.
    """
    if weight_R.requires_grad:
        raise ValueError("weighted_nll was given weights that want a gradient; use token_logprob and weigh its result")
    if isinstance(weight_VD, Packed):
        weight_VD = weight_VD.decode(hidden_RD.dtype)
    return choose("weighted_nll", NLL_IMPLS, hidden_RD)(hidden_RD, weight_VD, target_R, weight_R, words)


def weighted_nll_reference(
    hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor, words: Words | None = None
) -> Tensor:
    return -(token_logprob_reference(hidden_RD, weight_VD, target_R, words) * weight_R).sum()


def weighted_nll_chunked(
    hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor, words: Words | None = None
) -> Tensor:
    used = weight_R.nonzero()[:, 0]
    if used.shape[0] < weight_R.shape[0]:
        hidden_RD, target_R, weight_R = hidden_RD[used], target_R[used], weight_R[used]
    if not (torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)):
        sweep = Sweep(hidden_RD, weight_VD, target_R, words)
        return -torch.dot(sweep.logprob_R(), weight_R.to(wide(hidden_RD.dtype)))
    return WeightedNll.apply(hidden_RD, weight_VD, target_R, weight_R, words)


def chunk_logits(hidden_RD: Tensor, matrix_VD: Tensor) -> Tensor:
    return torch.mm(hidden_RD, matrix_VD.T).to(wide(hidden_RD.dtype))


def chunk_gradient(
    hidden_RD: Tensor, matrix_VD: Tensor, target_R: Tensor, words: Words | None
) -> tuple[Tensor, Tensor]:
    """(log-prob of each target, softmax - one-hot(target)) for one chunk of rows.

    log p(t) = logit(t) - logit(m) + log p(m) with m the likeliest word, whose probability cannot underflow: this saves
    the pass over all words that log-softmax beside softmax would cost.
    """
    logits_RV = chunk_logits(hidden_RD, matrix_VD)
    index_R1, here_R1 = own_words(target_R, logits_RV, words)
    peak_R1 = logits_RV.amax(-1, keepdim=True)
    distance_R1 = logits_RV.gather(-1, index_R1) - peak_R1
    softmax_RV = logits_RV.softmax(-1)
    spread_R1 = softmax_RV.amax(-1, keepdim=True).log()
    logprob_R1 = distance_R1 + spread_R1
    if words is not None:
        # The softmax over the own words becomes one over all: by the own words' share of all probability.
        own_R1 = peak_R1 - spread_R1
        top_R1 = words.largest(own_R1)
        weight_R1 = (own_R1 - top_R1).exp()
        sum_R1, target_R1 = words.added(torch.stack([weight_R1, (logprob_R1 + own_R1 - top_R1) * here_R1]))
        logprob_R1 = target_R1 - sum_R1.log()
        softmax_RV *= weight_R1 / sum_R1
    softmax_RV.scatter_add_(-1, index_R1, -here_R1)
    return logprob_R1[:, 0], softmax_RV


class Sweep:
    """Log-probs of all rows, chunk by chunk, and on request the gradient of sum(push * log-prob).

    - d log p(target) / d logits = softmax - one-hot(target). The push multiplies the narrow factors (hidden states and
    their gradient), never the wide logits.
    """

    def __init__(self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, words: Words | None = None):
        self.hidden_RD, self.target_R, self.words = hidden_RD, target_R, words
        self.weight_VD = weight_VD
        self.matrix_VD = weight_VD.to(hidden_RD.dtype)
        self.dtype = wide(hidden_RD.dtype)
        self.chunk = rows_for(ELEMENTS, len(weight_VD))

    def logprob_R(self) -> Tensor:
        chunks = zip(self.hidden_RD.split(self.chunk), self.target_R.split(self.chunk), strict=True)
        logits = ((chunk_logits(hidden, self.matrix_VD), target) for hidden, target in chunks)
        return torch.cat([logprob_of(logits_RV, target, self.words) for logits_RV, target in logits])

    def told_R(self) -> Tensor:
        """The same as an engine computes it: logit less the log of the sum, taken in float64."""
        found = []
        for hidden, target in zip(self.hidden_RD.split(self.chunk), self.target_R.split(self.chunk), strict=True):
            logits_RV = linear(hidden, self.weight_VD, wide=True)
            _, total_R = peak(logits_RV)
            found.append(logits_RV.gather(-1, target[:, None])[:, 0].double() - total_R)
        return torch.cat(found).to(self.dtype)

    def gradients(self, push_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, gradient of the hidden states, gradient of the matrix in float32)."""
        logprob_R = torch.empty(len(self.hidden_RD), dtype=self.dtype, device=self.hidden_RD.device)
        dhidden_RD = torch.empty_like(self.hidden_RD)
        dmatrix_VD = torch.zeros_like(self.matrix_VD, dtype=self.dtype)
        block = self.chunk * max(1, rows_for(HELD, len(self.matrix_VD)) // self.chunk)
        for begin in range(0, len(self.hidden_RD), block):
            rows = slice(begin, begin + block)
            hidden, push_R1 = self.hidden_RD[rows], -push_R[rows, None].to(self.dtype)
            dlogits = hidden.new_empty(len(hidden), len(self.matrix_VD))
            for start in range(0, len(hidden), self.chunk):
                part = slice(start, start + self.chunk)
                target = self.target_R[rows][part]
                logprob_R[rows][part], dlogits[part] = chunk_gradient(hidden[part], self.matrix_VD, target, self.words)
            dhidden_RD[rows] = torch.mm(dlogits, self.matrix_VD) * push_R1
            dmatrix_VD += dlogits.T @ (hidden * push_R1).to(hidden.dtype)
        return logprob_R, dhidden_RD, dmatrix_VD


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R, as_told):
        ctx.save_for_backward(hidden_RD, weight_VD, target_R)
        sweep = Sweep(hidden_RD, weight_VD, target_R)
        return sweep.told_R() if as_told else sweep.logprob_R()

    @staticmethod
    @once_differentiable
    def backward(ctx, push_R):  # type: ignore[override]
        hidden_RD, weight_VD, target_R = ctx.saved_tensors
        _, dhidden_RD, dmatrix_VD = Sweep(hidden_RD, weight_VD, target_R).gradients(push_R)
        return dhidden_RD, dmatrix_VD.to(weight_VD.dtype), None, None


class WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R, weight_R, words):
        sweep, weight_R = Sweep(hidden_RD, weight_VD, target_R, words), weight_R.to(wide(hidden_RD.dtype))
        logprob_R, dhidden_RD, dmatrix_VD = sweep.gradients(-weight_R)
        ctx.save_for_backward(dhidden_RD, dmatrix_VD)
        ctx.weight_dtype = weight_VD.dtype
        return -torch.dot(logprob_R, weight_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, push):  # type: ignore[override]
        dhidden_RD, dmatrix_VD = ctx.saved_tensors
        return dhidden_RD * push.to(dhidden_RD.dtype), (dmatrix_VD * push).to(ctx.weight_dtype), None, None, None


LOGPROB_IMPLS = (
    Impl("native", token_logprob_native, token_logprob_native_refuses),
    Impl("torch", token_logprob_chunked),
    Impl("reference", token_logprob_reference),
)
NLL_IMPLS = (Impl("torch", weighted_nll_chunked), Impl("reference", weighted_nll_reference))
