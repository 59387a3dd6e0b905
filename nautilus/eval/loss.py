"""Held-out loss: bits per byte by source, with general-purpose compressors beside it.

    bits per byte = (nats of all tokens) / ln 2 / (bytes of the text in UTF-8)

It does not depend on the tokenizer, as long as that loses nothing. The convention, which moves the number when
documents are short: each document is scored alone, from a fresh state, and every token of its text is charged. What the
first token costs depends on how the model was trained. With `start`, a token that stood before every document in
training, it is predicted from that token. Without (packing that resets the state between documents puts nothing before
them), no prediction was ever trained, so the first token costs ln(vocabulary), as if drawn blindly. The end of a
document is not charged: it stands for no byte.

`xz -9e` and `bzip2 -9` compress the same bytes, all documents of a source in one stream. They start from nothing, and
the model's own size is not counted: the comparison says how much the model has learned, not how to store files.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from nautilus.eval.loads import expert_loads
from nautilus.ops.loss import token_logprob
from nautilus.runtime import UserError

LOAD_TOKENS = 1 << 16  # enough to place the share of one expert in a thousand within 12 %


@dataclass(frozen=True, kw_only=True)
class Score:
    """One source's held-out text: what it costs the model, and what it costs two compressors."""

    source: str
    documents: int
    tokens: int
    bytes: int
    nats: float
    standard_error: float  # of bits_per_byte, over documents; nan where there is only one
    xz_bytes: int
    bz2_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def xz_bits_per_byte(self) -> float:
        return 8 * self.xz_bytes / self.bytes

    @property
    def bz2_bits_per_byte(self) -> float:
        return 8 * self.bz2_bytes / self.bytes


@dataclass(frozen=True, kw_only=True)
class Span:
    """Positions first..last of a document (0 is its first token): how many tokens were there, their mean nats."""

    first: int
    last: int
    tokens: int
    nats: float


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One Score per source; over all of them the loss by position and, per router, each expert's load over the mean."""

    scores: tuple[Score, ...]
    spans: tuple[Span, ...]
    loads: dict[str, list[float]]

    @property
    def total(self) -> Score:
        return pooled(self.scores)

    def within(self, length: int) -> float:
        """Mean nats of the tokens at the first `length` positions, of the spans that end among them."""
        near = [span for span in self.spans if span.last < length]
        return sum(span.tokens * span.nats for span in near) / sum(span.tokens for span in near) if near else math.nan


def held_out(
    model,
    encode: Callable[[str], Sequence[int]],
    sources: Mapping[str, Sequence[str]],
    *,
    limit_bytes: int = 1 << 20,
    start: int | None = None,
    chunk: int = 2048,
    budget: int = 16384,
    watch: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Scores the first `limit_bytes` of every source: a mapping from its name to its documents.

    `encode` gives the tokens of a text and nothing around them. `chunk` and `budget` bound one forward pass, see
    `document_nats`; they do not change the numbers. `watch(done, total)` hears about tokens as they are scored.
    """
    texts = {source: cut(documents, limit_bytes) for source, documents in sources.items()}
    refuse_empty(texts, sources, limit_bytes)
    tokens = {source: [list(encode(text)) for text in documents] for source, documents in texts.items()}
    nats = iter(document_nats(model, [*chain(*tokens.values())], start=start, chunk=chunk, budget=budget, watch=watch))
    costs = {source: [next(nats) for _ in documents] for source, documents in tokens.items()}
    fair = [begin(documents, LOAD_TOKENS // len(tokens)) for documents in tokens.values()]
    return HeldOut(
        scores=tuple(score(source, texts[source], costs[source]) for source in texts),
        spans=nats_by_position([*chain(*costs.values())]),
        loads=expert_loads(model, [*chain(*fair)], chunk=chunk),
    )


def refuse_empty(texts: Mapping[str, list[str]], sources: Mapping[str, Sequence[str]], limit_bytes: int) -> None:
    if not sources:
        raise UserError("held-out loss was asked for, but no source is given; name at least one with held-out text")
    for source, documents in texts.items():
        if not documents:
            raise UserError(
                f"held-out loss of source {source!r}: its {len(sources[source])} documents hold no text within the "
                f"first limit_bytes={limit_bytes}; hold out more text, raise the limit or leave the source out"
            )


def begin(documents: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first `tokens` tokens of the documents, as documents."""
    ends = accumulate(map(len, documents), initial=0)
    return [document[: tokens - end] for document, end in zip(documents, ends, strict=False) if end < tokens]


def cut(documents: Sequence[str], limit_bytes: int) -> list[str]:
    """The documents that make up the first `limit_bytes` bytes; the last one is cut between two characters."""
    kept, room = [], limit_bytes
    for text in documents:
        part = text.encode()[:room].decode(errors="ignore")
        if part:
            kept.append(part)
        room -= len(text.encode())
        if room <= 0:
            break
    return kept


def document_nats(
    model,
    documents: Sequence[Sequence[int]],
    *,
    start: int | None = None,
    chunk: int = 2048,
    budget: int = 16384,
    watch: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """nats[d][t] = -log p(token t of document d | start, the tokens before it), in float64 on the CPU.

    Without `start` the first token of each document costs ln(vocabulary). Documents of similar length share a padded
    batch of at most `budget` tokens. A row is fed `chunk` tokens at a time, its State carried from one to the next,
    so a document may be of any length.
    """
    nats, done, total = [torch.zeros(0)] * len(documents), 0, sum(map(len, documents))
    with reading(model):
        for batch in batches([len(document) for document in documents], budget):
            rows = [torch.tensor(documents[i], dtype=torch.int64, device=model.head_weight.device) for i in batch]
            nats_BT = row_nats(model, pad_sequence(rows, batch_first=True), start, chunk)
            for i, row, nats_T in zip(batch, rows, nats_BT.cpu(), strict=True):
                nats[i] = nats_T[: len(row)].clone()
                done += len(row)
            if watch is not None:
                watch(done, total)
    return nats


@contextlib.contextmanager
def reading(model) -> Iterator[None]:
    """Inside, the model neither trains nor counts; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices, longest first, in groups whose padded size stays within `budget`; a longer document goes alone."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, budget // max(1, lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def row_nats(model, tokens_BT: Tensor, start: int | None, chunk: int) -> Tensor:
    """-log p of every token of rows that each begin a document; right padding comes after all that counts."""
    vocab = model.head_weight.shape[0]
    if start is None:
        blind_BT = tokens_BT[:, :1].double().fill_(math.log(vocab))
        fed_BT, target_BT, pieces = tokens_BT[:, :-1], tokens_BT[:, 1:], [blind_BT]
    else:
        fed_BT, target_BT, pieces = pad(tokens_BT, (1, 0), value=start)[:, :-1], tokens_BT, [tokens_BT[:, :0].double()]
    state = None
    for low in range(0, target_BT.shape[1], chunk):
        hidden_BTD, state = model.hidden(fed_BT[:, low : low + chunk], state=state)
        target_R = target_BT[:, low : low + chunk].flatten()
        logprob_R = token_logprob(hidden_BTD.flatten(0, 1), model.head_weight, target_R)
        pieces.append(-logprob_R.double().view(len(tokens_BT), -1))
    return torch.cat(pieces, dim=1)


def score(source: str, documents: Sequence[str], nats: Sequence[Tensor]) -> Score:
    """The Score of texts whose tokens cost these nats. A loss that is not a number is an error, not a score."""
    sizes = torch.tensor([len(text.encode()) for text in documents], dtype=torch.float64)
    costs = torch.stack([document.sum() for document in nats])
    if not costs.isfinite().all():
        raise UserError(
            f"held-out loss of source {source!r} is not a number in {int((~costs.isfinite()).sum())} of {len(costs)} "
            f"documents; the model's weights hold NaN or infinity: go back to an earlier checkpoint"
        )
    data = "".join(documents).encode()
    return Score(
        source=source,
        documents=len(documents),
        tokens=sum(map(len, nats)),
        bytes=len(data),
        nats=costs.sum().item(),
        standard_error=ratio_error(costs, sizes) / math.log(2),
        xz_bytes=len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        bz2_bytes=len(bz2.compress(data, 9)),
    )


def ratio_error(tops: Tensor, bottoms: Tensor) -> float:
    """Standard error of sum(tops) / sum(bottoms) over independent pairs (linearised ratio estimator)."""
    pairs = len(tops)
    if pairs < 2:
        return math.nan
    residual = tops - tops.sum() / bottoms.sum() * bottoms
    return (residual.square().sum() * pairs / (pairs - 1)).sqrt().item() / bottoms.sum().item()


def pooled(scores: Sequence[Score], source: str = "all") -> Score:
    """All sources as one, each byte counting the same; the compressors' streams stay apart."""
    size = sum(score.bytes for score in scores)
    return Score(
        source=source,
        documents=sum(score.documents for score in scores),
        tokens=sum(score.tokens for score in scores),
        bytes=size,
        nats=math.fsum(score.nats for score in scores),
        standard_error=math.hypot(*(score.standard_error * score.bytes / size for score in scores)),
        xz_bytes=sum(score.xz_bytes for score in scores),
        bz2_bytes=sum(score.bz2_bytes for score in scores),
    )


def nats_by_position(nats: Sequence[Tensor]) -> tuple[Span, ...]:
    """Mean nats of the tokens at positions 0, 1, 2-3, 4-7, 8-15 and so on of their documents.

    A model that uses what it has read shows a fall; the position where the fall ends is how far back it looks.
    """
    spans, first = [], 0
    longest = max(map(len, nats), default=0)
    while first < longest:
        last = max(2 * first - 1, first)
        inside = torch.cat([document[first : last + 1] for document in nats])
        spans.append(Span(first=first, last=last, tokens=len(inside), nats=inside.mean().item()))
        first = last + 1
    return tuple(spans)
