"""How many tokens of a draft are tried, so that more tokens come in a second: never more than that pays.

A pass over 1 + L tokens costs C(1 + L), on a sparse model far more than C(1), and gives 1 + A tokens, A of the draft
that come true. Tried are those L that make (1 + A) / C(1 + L) largest, if that is more than a plain step gives.
Expected is

    A(L) = sum_{i <= L} p_i q^i

p_i is the share of the places that go on so (`suffix.py`), q how often tokens after matches of about this length have
come true in this request; the fewer there were, the nearer it is to PRIOR. A request's drafts are copied from its own
tokens, and from answers before it of the same tenant.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.suffix import MATCH, Draft, SuffixCache
from nautilus.serve.forward import Forward
from nautilus.serve.request import Request

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of drafts
GAIN = 1.03  # more than a plain step by so much, or it is not tried
LOSS = 0.01  # of the time of plain steps that may be lost with looking for what is not there
PATIENCE = 64  # tokens after which a request that had no use for drafts is looked at again at the latest
SOURCES = ("plain", "cache", "mtp", "eagle", "grammar")  # of tokens
TENANTS, SHARED = 32, 1 << 15  # whose answers are known, the latest tokens of each: at most 18 MB
PRIOR, TRUST = (
    (0.5, 0.7, 0.85, 0.9, 0.95),
    8.0,
)  # of matches of 3, 6, 12 .. tokens, and after how many tokens it is half


@dataclass
class Counts:
    """Passes with a draft, tokens of them, and how many came true."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Known:
    """Of one request: its tokens as text to copy from, what came true after matches of each class, when to look."""

    copies: SuffixCache = field(default_factory=SuffixCache)
    tried: list[float] = field(default_factory=lambda: [0.0] * len(PRIOR))
    true: list[float] = field(default_factory=lambda: [0.0] * len(PRIOR))
    pause: int = 0
    wait: int = 0


class Speculation:
    """For one engine. `costs` are those of passes over 1 + L tokens of one request, `steps` those of plain steps by
    their number of requests."""

    def __init__(self, most: int):
        self.most = most
        self.costs, self.steps, self.counts = Costs(), Costs(), Counts()
        self.known: dict[Request, Known] = {}
        self.shared: OrderedDict[str, SuffixCache] = OrderedDict()
        self.asked: dict[Request, Draft] = {}

    def measure(self, forward: Forward) -> None:
        """Once, before the first request: what passes cost, over random tokens at the beginning of a text."""
        sizes = [1, *(1 + length for length in LENGTHS if length <= self.most)]
        berth = None if self.costs.seconds else forward.berths.take(sizes[-1])
        if berth is None:
            return
        draw, vocab = random.Random(0), forward.model.config.vocab

        def run(size: int) -> None:
            tokens = [draw.randrange(vocab) for _ in range(size)]
            if size == 1:
                forward.step([berth], tokens)
            else:
                forward.attempt([berth], [tokens])
                forward.accept([berth], [0])
            berth.length = 0

        try:
            self.costs.measure(sizes, run)
        finally:
            forward.berths.give_back(berth)
        self.steps.add(1, self.costs.seconds[1])

    def propose(self, request: Request, rows: int, room: int) -> tuple[int, ...]:
        """What to try for a request among `rows` that get a token; at most `room` tokens. () for a plain step."""
        known = self.known.get(request)
        if known is None:
            known = self.known[request] = Known()
        if known.wait > 0:
            known.wait -= 1
            return ()
        saved = self.step_seconds(rows)
        if saved is None or room < 1:
            return ()
        begin = time.perf_counter()
        draft = self.best(request, known, min(room, self.most))
        length = self.length(known, draft, saved) if draft else 0
        if not length:
            looked = time.perf_counter() - begin
            known.pause = min(2 * known.pause + 1, PATIENCE, math.ceil(looked / (LOSS * saved)))
            known.wait = known.pause
            return ()
        assert draft is not None
        self.asked[request] = draft
        return draft.tokens[:length]

    def step_seconds(self, rows: int) -> float | None:
        """What it costs to have this request in a plain step of so many; None where that is not known. Timings of other
        moments may say that a row more takes no time: then no draft can pay."""
        whole, others = self.steps.of(rows), self.steps.of(rows - 1) if rows > 1 else 0.0
        return None if whole is None or others is None or whole <= others else whole - others

    def best(self, request: Request, known: Known, most: int) -> Draft | None:
        own = known.copies
        own.extend(request.tokens[len(own.tokens) :])
        drafts = [own.draft(own.tokens, most)]
        if request.tenant in self.shared:
            drafts.append(self.shared[request.tenant].draft(request.tokens[-MATCH:], most))
        return max((draft for draft in drafts if draft), key=lambda draft: draft.score, default=None)

    def length(self, known: Known, draft: Draft, saved: float) -> int:
        """How many tokens of it pay most; 0 for none."""
        rate, expected, best, length = self.truth(known, draft.match), 0.0, GAIN / saved, 0
        for at, prob in enumerate(draft.probs, 1):
            expected += prob * rate**at
            if at in LENGTHS and (seconds := self.costs.of(1 + at)) and (1 + expected) / seconds > best:
                best, length = (1 + expected) / seconds, at
        return length

    def truth(self, known: Known, match: int) -> float:
        """How often one more token comes true after such a match."""
        kind = kind_of(match)
        return (known.true[kind] + TRUST * PRIOR[kind]) / (known.tried[kind] + TRUST)

    def learn(self, request: Request, tried: int, accepted: int) -> None:
        """So many of the tokens that were proposed came true."""
        known, draft = self.known[request], self.asked.pop(request)
        kind = kind_of(draft.match)
        known.tried[kind] += min(accepted + 1, tried)  # what stands behind the first wrong one says nothing
        known.true[kind] += accepted
        known.pause = known.wait = 0
        self.counts.drafts += 1
        self.counts.drafted += tried
        self.counts.accepted += accepted

    def finish(self, request: Request) -> None:
        """It has ended: what it says is known to those of the same tenant that come later."""
        self.known.pop(request, None)
        self.asked.pop(request, None)
        if len(request.tokens) == request.prompt:
            return
        shared = self.shared.setdefault(request.tenant, SuffixCache(most=SHARED))
        self.shared.move_to_end(request.tenant)
        if len(self.shared) > TENANTS:
            self.shared.popitem(last=False)
        shared.begin()
        shared.extend(request.tokens[request.prompt :])


def kind_of(match: int) -> int:
    """Matches of 3 to 5, 6 to 11, 12 to 23 tokens, and so on."""
    return min(len(PRIOR) - 1, max(0, (match // 3).bit_length() - 1))
