"""The one thing a stream yields and an objective reads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

EVIDENCE = ("document", "advantage", "sampled_logprob", "proximal_logprob", "teacher_logprob")


@dataclass
class Batch:
    """Rows of tokens and how much each token counts, all of shape (B, T) and aligned: nothing is shifted by one.

    `weights` has one entry per objective term; `weights["next_token"][b, t]` says how much token t counts as a target,
    so it is 0 at t = 0. Equal adjacent numbers in `document` are one document; None means one document per row.
    Of reinforcement learning: `advantage`, what a token earned; the log-probs that it had for the engine that drew it
    (`sampled_logprob`), for the trained model before the first update on it (`proximal_logprob`; None: the update is
    the first), and for a teacher or a reference (`teacher_logprob`).
    routes: the experts that wrote each token, (B, T, L, K); -1 where nobody knows (`train/replay.py`).
    alike, common: rows with equal numbers in `alike`, of shape (B,), have the same first `common` columns, documents
    included; None: nothing is known of that (`train/shared.py`).
    teacher: who teaches the rows, by name, where it is asked of more than the log-probs of their tokens.
    update: which one of its step it is learnt by, where the step has several.
    told: (sum, count) of what is worth a place in the step's metrics and no objective knows of.
    A packed Batch is itself a source of rows: it has a length, a fingerprint, and gives rows by number.
    """

    tokens: Tensor
    weights: dict[str, Tensor]
    document: Tensor | None = None
    advantage: Tensor | None = None
    sampled_logprob: Tensor | None = None
    proximal_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    routes: Tensor | None = None
    alike: Tensor | None = None
    common: int = 0
    teacher: str = ""
    update: int = 0
    told: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self):
        check("tokens", self.tokens, self.tokens.shape, floating=False)
        if self.tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tuple(self.tokens.shape)}; a batch is (rows, time)")
        if not self.weights:
            raise ValueError("a batch needs weights for at least one objective term, such as {'next_token': ...}")
        for name, weight in self.weights.items():
            check(f"weights[{name!r}]", weight, self.tokens.shape, floating=True)
        for name, value in self.evidence().items():
            check(name, value, self.tokens.shape, floating=name != "document")
        if self.routes is not None and self.routes.shape[:2] != self.tokens.shape:
            raise ValueError(f"routes has shape {tuple(self.routes.shape)}, tokens {tuple(self.tokens.shape)}")
        if self.alike is not None and not 0 < self.common < self.tokens.shape[1]:
            raise ValueError(f"common={self.common} columns cannot be shared by rows of {self.tokens.shape[1]}")
        if self.alike is not None:
            check("alike", self.alike, self.tokens.shape[:1], floating=False)

    def evidence(self) -> dict[str, Tensor]:
        """The optional tensors that are there."""
        return {name: vars(self)[name] for name in EVIDENCE if vars(self)[name] is not None}

    def by_row(self) -> dict[str, Tensor]:
        """The optional tensors that are there and have other shapes than the tokens."""
        return {name: vars(self)[name] for name in ("routes", "alike") if vars(self)[name] is not None}

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device) for name, value in self.evidence().items()}
        weights = {name: weight.to(device) for name, weight in self.weights.items()}
        moved |= {name: value.to(device) for name, value in self.by_row().items()}
        return dataclasses.replace(self, tokens=self.tokens.to(device), weights=weights, **moved)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Sequence[int]) -> Batch:
        """These rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.tokens.device)
        taken = {name: value[index] for name, value in (self.evidence() | self.by_row()).items()}
        weights = {name: weight[index] for name, weight in self.weights.items()}
        return dataclasses.replace(self, tokens=self.tokens[index], weights=weights, told={}, **taken)

    @property
    def fingerprint(self) -> str:
        """Short hash of everything in the batch."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        tensors = (
            {"tokens": self.tokens} | {f"weights.{k}": v for k, v in sorted(self.weights.items())} | self.evidence()
        )
        for name, value in tensors.items():
            plain = value.detach().cpu().double() if value.is_floating_point() else value.cpu()
            digest.update(name.encode() + plain.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def check(name: str, value: Tensor, shape: torch.Size, *, floating: bool):
    right_type = value.dtype.is_floating_point if floating else value.dtype == torch.int64
    if not right_type:
        raise ValueError(
            f"{name} has type {value.dtype}; it must be {'a floating type' if floating else 'torch.int64'}"
        )
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)} but tokens has {tuple(shape)}; they must be equal")


def join(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches under one another. A term that a batch does not know weighs 0 in its rows."""
    if len(batches) == 1:
        return batches[0]
    lengths = sorted({batch.tokens.shape[1] for batch in batches})
    if len(lengths) != 1:
        raise ValueError(f"cannot join batches of row lengths {lengths}; pack every source to one length")
    terms = sorted({name for batch in batches for name in batch.weights})
    weights = {
        name: torch.cat([b.weights.get(name, torch.zeros(b.tokens.shape, device=b.tokens.device)) for b in batches])
        for name in terms
    }
    found = {name for batch in batches for name in batch.evidence()}
    whole = {name: torch.cat([evidence_or_default(b, name) for b in batches]) for name in EVIDENCE if name in found}
    return dataclasses.replace(Batch(torch.cat([b.tokens for b in batches]), weights), **whole)


def evidence_or_default(batch: Batch, name: str) -> Tensor:
    """What a row without this evidence means: one document; for numbers, 0, which its zero weight keeps out."""
    if name in batch.evidence():
        return batch.evidence()[name]
    if name == "document":
        return torch.ones_like(batch.tokens)
    return torch.zeros(batch.tokens.shape, device=batch.tokens.device)
