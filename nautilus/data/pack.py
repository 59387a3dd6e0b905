"""Documents of any length → rows of one length.

`pack_stream` is for pre-training: documents, an end token after each, one long text cut at the row ends.
`pack_best_fit` is for conversations: no document is cut. In both, a token counts where something in its row can predict
it: the first token of a row never does, and with `reset` neither does the first of each document, whose state starts
empty.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from nautilus.data.batch import Batch
from nautilus.runtime import UserError


def pack_stream(
    documents: Iterable[Sequence[int]],
    *,
    length: int,
    end: int,
    pad: int = 0,
    reset: bool = True,
    term: str = "next_token",
) -> Batch:
    """Every document followed by `end`, one after another, cut into rows; the last row is filled with `pad`."""
    flat: list[int] = []
    for i, document in enumerate(documents):
        if end in document:
            raise ValueError(f"document {i} holds the end token {end}, which would split it; encode it as plain text")
        flat += [*document, end]
    return cut_rows(
        [np.asarray(flat[i : i + length]) for i in range(0, len(flat), length)], length, end, pad, reset, term
    )


def cut_rows(rows: Sequence[np.ndarray], length: int, end: int, pad: int, reset: bool, term: str) -> Batch:
    """Pieces of one stream, each at most `length` long, as a Batch. A document goes on until its end token.

    Padding is document 0, of weight 0. Without `reset` a row is one continuous text: no documents, and the first token
    after an end token counts like any other.
    """
    if not rows or length < 2:
        raise ValueError(
            f"{len(rows)} rows of length {length} make no batch; it needs text, and rows of at least 2 tokens"
        )
    tokens_RT = np.full((len(rows), length), pad, dtype=np.int64)
    real_RT = np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        tokens_RT[i, : len(row)] = row
        real_RT[i, : len(row)] = True
    first_RT = np.zeros_like(real_RT)
    first_RT[:, 1:] = tokens_RT[:, :-1] == end
    first_RT[:, 0] = True
    weight_RT = real_RT & ~first_RT if reset else real_RT.copy()
    weight_RT[:, 0] = False
    document_RT = np.where(real_RT, first_RT.cumsum(axis=1), 0)
    return Batch(
        torch.from_numpy(tokens_RT),
        {term: torch.from_numpy(weight_RT.astype(np.float32))},
        document=torch.from_numpy(document_RT) if reset else None,
    )


def pack_best_fit(
    samples: Sequence[tuple[Sequence[int], Sequence[float]]], *, length: int, pad: int = 0, term: str = "next_token"
) -> Batch:
    """Whole samples (tokens, weight of each as a target) into rows, each into the fullest row that still has room.

    Long samples are placed first, which leaves the least padding. Documents count from 1; padding is document 0.
    """
    for i, (tokens, weights) in enumerate(samples):
        if len(tokens) != len(weights):
            raise ValueError(f"sample {i} has {len(tokens)} tokens but {len(weights)} weights; each token needs one")
        if not 0 < len(tokens) <= length:
            raise UserError(f"sample {i} has {len(tokens)} tokens, rows have {length}; raise length or leave it out")
    rows = best_fit([len(tokens) for tokens, _ in samples], length)
    shape = (len(rows), length)
    tokens_RT, document_RT = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weight_RT = np.zeros(shape, dtype=np.float32)
    for r, row in enumerate(rows):
        start = 0
        for number, i in enumerate(row, start=1):
            here = slice(start, start := start + len(samples[i][0]))
            tokens_RT[r, here], weight_RT[r, here] = samples[i]
            document_RT[r, here] = number
            weight_RT[r, here.start] = 0
    return Batch(
        torch.from_numpy(tokens_RT), {term: torch.from_numpy(weight_RT)}, document=torch.from_numpy(document_RT)
    )


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of lengths, grouped so that no group's sum exceeds `room`; best fit in decreasing order of length."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect.bisect_left(open_rows, (lengths[i], 0))
        if found < len(open_rows):
            left, row = open_rows.pop(found)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(open_rows, (left - lengths[i], row))
    return rows
