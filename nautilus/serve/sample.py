"""One token from the logits of one position. Letters: B requests, V vocabulary, K candidates that pass the filters.

    temperature   p = softmax(logits / temperature); 0 means greedy: the most probable token, always
    top-k         the k most probable tokens
    top-p         of those, the fewest most probable ones that hold at least the share p of their mass
    min-p         of those, the ones at least min_p times as probable as the most probable one
    draw          one of those, in proportion to p

in this order. Among equally probable tokens the one with the lower id comes first. The random number of a draw depends
on the request's seed and on the token's position in its context only: neither the other requests of a batch, nor where
a text was cut and resumed, change what is drawn.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nautilus.runtime import UserError

POOL = 1024  # candidates looked at first under top-p alone: sorting all of 131,072 logits takes 11 ms, of these 0.4 ms


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen and when it ends. What ends an answer is not part of its text."""

    temperature: float = field(
        default=1.0, metadata={"help": "0 takes the most probable token, 1 draws from the model"}
    )
    top_k: int = field(default=0, metadata={"help": "draw from the k most probable tokens (0: all)"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the fewest tokens with this share (1: all)"})
    min_p: float = field(default=0.0, metadata={"help": "least probability, as a part of the highest (0: all)"})
    seed: int = field(default=0, metadata={"help": "same seed, same answer"})
    max_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "strings that end an answer"})
    stop_tokens: tuple[int, ...] = field(
        default=(), metadata={"help": "tokens that end an answer, with the model's own"}
    )

    def __post_init__(self):
        for name, holds, advice in (
            ("temperature", real(self.temperature) and 0 <= self.temperature < math.inf, "be 0 (greedy) or positive"),
            (
                "top_k",
                whole(self.top_k) and self.top_k >= 0,
                "be 0 (keep all tokens) or how many to keep, a whole number",
            ),
            ("top_p", real(self.top_p) and 0 < self.top_p <= 1, "lie in (0, 1]; 1 keeps all tokens"),
            ("min_p", real(self.min_p) and 0 <= self.min_p <= 1, "lie in [0, 1]; 0 keeps all tokens"),
            ("seed", whole(self.seed) and 0 <= self.seed < 1 << 64, "be a whole number in [0, 2^64); choose another"),
            (
                "max_tokens",
                whole(self.max_tokens) and self.max_tokens >= 1,
                "be a whole number, at least 1; ask for a token or more",
            ),
            ("stop", listed(self.stop, text), "be a tuple of strings that are not empty, such as ('###',)"),
            ("stop_tokens", listed(self.stop_tokens, whole), "be a tuple of token ids"),
        ):
            if not holds:
                raise UserError(f"sampling.{name}={getattr(self, name)!r} was asked for; it must {advice}")


def whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def listed(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def draw(logits_BV: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[tuple[int, float]]:
    """For each request the token that stands at its position, and the log-prob the model itself (before temperature and
    filters) gives that token. Requests are treated one by one, so none depends on its neighbours."""
    rows = zip(logits_BV.unbind(), samplings, positions, strict=True)
    return [draw_one(logits_V, sampling, position) for logits_V, sampling, position in rows]


def draw_one(logits_V: Tensor, sampling: Sampling, position: int) -> tuple[int, float]:
    """Inverse transform sampling: the first candidate, by id, at which the cumulated probability exceeds u."""
    logits_V = logits_V.double().cpu()
    if not math.isfinite(logits_V.max()):
        raise UserError(
            f"token {position} was asked for, but the model's logits hold NaN or infinity there; its weights are "
            "broken or its number format overflows: load an earlier checkpoint or a wider format"
        )
    id_K, probs_K = candidates(logits_V, sampling)
    cumulated_K = probs_K.cumsum(0)
    chosen = torch.searchsorted(cumulated_K, uniform(sampling.seed, position) * cumulated_K[-1], right=True)
    token = int(id_K[chosen])
    return token, float(logits_V[token] - logits_V.logsumexp(0))


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The ids that may be drawn, ascending, and their weights (float64, proportional to the probabilities)."""
    if sampling.temperature == 0:
        return logits_V.argmax()[None], torch.ones(1, dtype=torch.float64)
    # The maximum is taken off before the division, so that no temperature, however small, overflows.
    probs_V = ((logits_V.double() - logits_V.max()) / sampling.temperature).softmax(0)
    id_K = kept(probs_V, sampling).sort().values
    return id_K, probs_V[id_K]


def kept(probs_V: Tensor, sampling: Sampling) -> Tensor:
    """The ids that pass the filters, in any order."""
    if not sampling.top_k and sampling.top_p == 1:
        return (probs_V >= sampling.min_p * probs_V.max()).nonzero()[:, 0]
    id_K = ranked(probs_V, sampling.top_k or POOL)
    mass = 1.0
    if sampling.top_k:
        id_K = id_K[: sampling.top_k]
        mass = probs_V[id_K].sum()
    elif probs_V[id_K].sum() < sampling.top_p:
        id_K = ranked(probs_V, len(probs_V))
    probs_K = probs_V[id_K]
    before_K = probs_K.cumsum(0).roll(1)
    before_K[0] = 0
    passes_K = probs_K >= sampling.min_p * probs_K[0]
    if sampling.top_p < 1:
        passes_K &= before_K < sampling.top_p * mass
    return id_K[passes_K]


def ranked(probs_V: Tensor, size: int) -> Tensor:
    """Ids of the `size` most probable tokens and of all as probable as the last: most probable first, then by id."""
    if size >= len(probs_V):
        return probs_V.sort(descending=True, stable=True).indices
    pool_K = (probs_V >= probs_V.topk(size).values[-1]).nonzero()[:, 0]
    return pool_K[probs_V[pool_K].sort(descending=True, stable=True).indices]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: Philox 4x64 counts positions under the seed's key.

    52 bits, not 53: u < 1 - 2^-52 keeps u times a sum of floats strictly below the sum after rounding.
    """
    return (int(np.random.Philox(key=seed, counter=position).random_raw()) >> 12) * 2.0**-52
