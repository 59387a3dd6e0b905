"""Drafts of a small block that was trained beside the model, token by token. Letters: N tokens of all rows, R rows,
D width, K tokens that may be drafted.

For every token t_p of a request the block keeps keys and values, made of what the model had made of the token before
and of this one's embedding. What comes out there foretells the next token, and the block goes on from it:

    h_p = block(f_{p-1}, Emb[t_p]),  t_{p+1} = argmax head(h_p),  h_{p+1} = block(h_p, Emb[t_{p+1}]), ...

f are features of the model: its hidden states, for multi-token prediction. Once the model has read tokens that were
drafted, what is kept of them is made anew from features ("catching up"). A request that goes on from a known prefix has
no feature of the token before; nought stands for it, at one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nautilus.config import Layer
from nautilus.model.eagle import Eagle
from nautilus.model.language import Language
from nautilus.model.state import Span
from nautilus.ops.formats import Packed
from nautilus.ops.linear import linear
from nautilus.ops.pages import Pool
from nautilus.ops.peak import peak
from nautilus.serve.draft.costs import Costs, timed
from nautilus.serve.forward import Forward, Step
from nautilus.serve.memory import Berth, share_out, write
from nautilus.serve.recorded import Recorded
from nautilus.serve.request import Request
from nautilus.serve.seen import Seen, raw

CAUGHT = 16  # tokens whose catching up is timed


class Head(Protocol):
    """A block that drafts. taps: the layers of the model whose output it reads; none: the final hidden states."""

    source: str
    layers: tuple[Layer, ...]
    taps: tuple[int, ...]

    def feature(self, seen_ND: Tensor) -> Tensor:
        """What the block takes, of what was tapped, side by side."""
        ...

    def block(self, feature_1ND: Tensor, ahead_1ND: Tensor, span: Span, memory: Sequence[Pool | None]) -> Tensor: ...

    def logits(self, hidden_1ND: Tensor) -> Tensor: ...

    def token(self, best: int) -> int:
        """The model's id of a drafted one."""
        ...


class MtpHead:
    """The model's own block for multi-token prediction. most: tokens of the vocabulary that it drafts, the first ones:
    in a tokenizer's order of merging these are the frequent ones, and the head is most of what a draft costs.
    """

    source, taps = "mtp", ()

    def __init__(self, model: Language, most: int):
        self.model, self.layers, self.most = model, model.config.mtp, most
        self.cut: tuple[Tensor | Packed, Tensor | Packed] | None = None  # the head, and its first rows

    def feature(self, seen_ND: Tensor) -> Tensor:
        return seen_ND

    def block(self, feature_1ND: Tensor, ahead_1ND: Tensor, span: Span, memory: Sequence[Pool | None]) -> Tensor:
        return self.model.mtp(feature_1ND, ahead_1ND, span, memory)

    def logits(self, hidden_1ND: Tensor) -> Tensor:
        whole = self.model.head_weight
        if self.most >= self.model.config.vocab:
            return linear(hidden_1ND, whole, wide=True)
        if self.cut is None or self.cut[0] is not whole:
            first = whole.rows(torch.arange(self.most)) if isinstance(whole, Packed) else whole[: self.most]
            self.cut = whole, first
        return linear(hidden_1ND, self.cut[1], wide=True)

    def token(self, best: int) -> int:
        return best


class EagleHead:
    """A draft head that was trained for the model."""

    source = "eagle"

    def __init__(self, eagle: Eagle):
        self.eagle, self.ids = eagle.requires_grad_(False).eval(), eagle.token_ids_K.tolist()
        self.taps: tuple[int, ...] = eagle.taps
        self.layers: tuple[Layer, ...] = (eagle.attention,)

    def feature(self, seen_ND: Tensor) -> Tensor:
        return self.eagle.fc(seen_ND)

    def block(self, feature_1ND: Tensor, ahead_1ND: Tensor, span: Span, memory: Sequence[Pool | None]) -> Tensor:
        return self.eagle(feature_1ND, ahead_1ND, span, memory)

    def logits(self, hidden_1ND: Tensor) -> Tensor:
        return self.eagle.head(hidden_1ND)

    def token(self, best: int) -> int:
        return self.ids[best]


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """Tokens, and how probable the block held each."""

    tokens: tuple[int, ...]
    probs: tuple[float, ...]


class Chain:
    """One block at work for an engine, whose berths hold its keys and values too, behind the model's own layers."""

    def __init__(self, forward: Forward, head: Head):
        self.forward, self.head, self.berths = forward, head, forward.berths
        pools = forward.berths.layers[len(forward.model.config.layers) :]
        self.memory, self.taps = [pool if isinstance(pool, Pool) else None for pool in pools], head.taps
        self.calls: dict[tuple[int, int], BlockCall] = {}
        self.tops: dict[int, TopCall] = {}

    def forget(self) -> None:
        """What was recorded of the weights."""
        self.calls.clear()
        self.tops.clear()

    @torch.inference_mode()
    def measure(self, costs: Costs, berth: Berth, most: int) -> float:
        """Of drafts of one to so many tokens, from the beginning of a text; seconds of each token that is caught up."""
        model = self.forward.model
        like_ND = torch.zeros(CAUGHT, model.config.width, dtype=model.compute, device=self.berths.device)

        def run(size: int) -> None:
            hidden_RD = like_ND[:1]
            for at in range(size):
                hidden_RD = self.call([berth], [1], [1 + at], [0], hidden_RD)
                self.top(hidden_RD)

        costs.measure(range(1, most + 1), run)
        catch = lambda size: self.call([berth], [size], [size], [0] * size, like_ND[:size])
        found = timed(catch, (1, CAUGHT))
        return max(0.0, found[CAUGHT] - found[1]) / (CAUGHT - 1)

    def see(self, berth: Berth, step: Step, begin: int, count: int) -> None:
        """What the model made of the next tokens of a berth."""
        if berth.behind is not None:
            berth.behind.add(step.seen, step.raw, begin, count)

    @torch.inference_mode()
    def read(self, berth: Berth, tokens_1N: Tensor, seen_ND: Tensor) -> None:
        """The model has read this part of a prompt: so does the block."""
        assert berth.awake is not None
        before_1D = berth.behind.rows[-1:] if berth.behind else torch.zeros_like(seen_ND[:1])
        feature_1ND = self.head.feature(torch.cat([before_1D, seen_ND[:-1]]))[None]
        span = Span(0, torch.arange(tokens_1N.shape[1]), lanes=berth.awake)
        self.head.block(feature_1ND, self.forward.model.embed(tokens_1N), span, self.memory)
        berth.behind = Seen()
        berth.behind.add([seen_ND], [raw(seen_ND)], len(seen_ND) - 1, 1)

    @torch.inference_mode()
    def catch_up(self, requests: Sequence[Request], *, leaving: bool = False) -> Tensor:
        """hidden_RD of the last token of each, after all that the model has made of those before. Leaving: what is
        kept of the request is to end where the model's own does, a token earlier; the result is of no use."""
        berths, counts, tokens, seen = [], [], [], []
        for request in requests:
            berth = request.berth
            assert berth is not None and berth.behind is not None
            count, end = len(berth.behind) - leaving, len(request.tokens) - leaving
            if count > 0:
                berths.append(berth)
                counts.append(count)
                tokens += request.tokens[end - count : end]
                seen.append(berth.behind.rows[:count])
        if not berths:
            return torch.empty(0)
        feature_ND = self.head.feature(seen[0] if len(seen) == 1 else torch.cat(seen))
        lengths = [berth.length + (not leaving) for berth in berths]
        hidden_ND = self.call(berths, counts, lengths, tokens, feature_ND)
        for berth in berths:
            assert berth.behind is not None
            berth.behind.keep(int(leaving))
        return hidden_ND[torch.tensor(counts).cumsum(0) - 1]

    def call(
        self, berths: Sequence[Berth], counts: Sequence[int], lengths: Sequence[int], tokens: Sequence[int],
        feature_ND: Tensor,
    ) -> Tensor:  # fmt: skip
        sizes = len(berths), len(tokens)
        if sizes not in self.calls:
            self.calls[sizes] = BlockCall(self, *sizes)
        return self.calls[sizes].run(berths, counts, lengths, tokens, feature_ND)

    def top(self, hidden_RD: Tensor) -> tuple[list[int], list[float]]:
        """The most probable token of each row, and its probability."""
        rows = len(hidden_RD)
        if rows not in self.tops:
            self.tops[rows] = TopCall(self, rows)
        return self.tops[rows].run(hidden_RD)

    @torch.inference_mode()
    def draft(
        self, asked: Mapping[Request, int], go_on: Callable[[Request, Sequence[float]], bool] = lambda *_: True
    ) -> dict[Request, Foretold]:
        """At most so many tokens for each request, which has room for them, as long as go_on(request, probs so far)."""
        live, hidden_RD = [*asked], self.catch_up([*asked])
        tokens: dict[Request, list[int]] = {request: [] for request in live}
        probs: dict[Request, list[float]] = {request: [] for request in live}
        while live:
            best, prob = self.top(hidden_RD)
            for request, token, p in zip(live, best, prob, strict=True):
                tokens[request].append(self.head.token(token))
                probs[request].append(p)
            keep = [
                row
                for row, request in enumerate(live)
                if len(tokens[request]) < asked[request] and math.isfinite(prob[row]) and go_on(request, probs[request])
            ]
            if len(keep) < len(live):
                hidden_RD = hidden_RD[keep]
            live = [live[row] for row in keep]
            if live:
                berths = [request.berth for request in live if request.berth]
                ends = [len(request.tokens) + len(tokens[request]) for request in live]
                latest = [tokens[request][-1] for request in live]
                hidden_RD = self.call(berths, [1] * len(live), ends, latest, hidden_RD)
        return {request: Foretold(tokens=(*tokens[request],), probs=(*probs[request],)) for request in asked}


class BlockCall:
    """So many tokens for so many rows through the block."""

    def __init__(self, chain: Chain, rows: int, count: int):
        self.chain, model = chain, chain.forward.model
        device = chain.berths.device
        self.lanes = chain.berths.lanes(rows)
        self.tokens_1N = torch.zeros(1, count, dtype=torch.int64, device=device)
        self.feature_1ND = torch.zeros(1, count, model.config.width, dtype=model.compute, device=device)
        self.span = Span(0, torch.arange(count, device=device), lanes=self.lanes)
        rows_in = self.lanes.rows
        inputs = [self.tokens_1N, self.feature_1ND, rows_in.begin, rows_in.length, rows_in.table_BL]
        self.recorded = Recorded(self.compute, inputs)

    def run(self, berths, counts, lengths, tokens, feature_ND: Tensor) -> Tensor:
        rows = self.lanes.rows
        share_out(self.lanes, counts)
        write(rows.length, lengths)
        for row, berth in enumerate(berths):
            write(rows.table_BL[row, : len(berth.pages)], berth.pages)
        write(self.tokens_1N[0], tokens)
        self.feature_1ND[0].copy_(feature_ND)
        return self.recorded.run()[0]

    @torch.inference_mode()
    def compute(self) -> Tensor:
        forward, head = self.chain.forward, self.chain.head
        with forward.computing():
            ahead_1ND = forward.model.embed(self.tokens_1N)
            return head.block(self.feature_1ND, ahead_1ND, self.span, self.chain.memory)


class TopCall:
    """The head over the last token of so many rows."""

    def __init__(self, chain: Chain, rows: int):
        self.chain, model = chain, chain.forward.model
        self.hidden_1RD = torch.zeros(1, rows, model.config.width, dtype=model.compute, device=chain.berths.device)
        self.recorded = Recorded(self.compute, [self.hidden_1RD])

    def run(self, hidden_RD: Tensor) -> tuple[list[int], list[float]]:
        self.hidden_1RD[0].copy_(hidden_RD)
        logits_RK = self.recorded.run()
        best_R, total_R = peak(logits_RK)
        best = best_R.tolist()
        found = zip(best, total_R.tolist(), strict=True)
        return best, [math.exp(float(logits_RK[row, id]) - total) for row, (id, total) in enumerate(found)]

    @torch.inference_mode()
    def compute(self) -> Tensor:
        with self.chain.forward.computing():
            return self.chain.head.logits(self.hidden_1RD)[0]
