"""Drafts for the requests of an engine: where they come from, how many tokens are tried, what became of them.

| source | drafts |
|---|---|
| cache | copied from the request itself, from answers before it of the same tenant, from a corpus (`copies.py`) |
| mtp, eagle | of a small block beside the model (`chain.py`) |
| grammar | what a rule of the request leaves no choice of |

What is tried is what gives most tokens in a second, by the costs measured here and by how much of a draft will come
true (`choice.py`). Requests that run together have one pass, and share its tokens out. No draft changes what is
answered: every token is drawn as it would have been without. Where nothing pays, the search for drafts pauses for so
long that it takes a hundredth of the time, and so does a request that has lost by them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nautilus.serve.draft.chain import Chain
from nautilus.serve.draft.choice import choose, share_out
from nautilus.serve.draft.copies import Copied, Copies
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.features import Situation, Spelling, features_of
from nautilus.serve.draft.history import Depths, History
from nautilus.serve.draft.predictor import Predictor
from nautilus.serve.draft.proposal import DEEPEST, SOURCES, Candidate, Counts, Proposal
from nautilus.serve.draft.suffix import SuffixCache
from nautilus.serve.draft.trust import Belief, MatchTrust
from nautilus.serve.forward import Forward
from nautilus.serve.request import Request

log = logging.getLogger("nautilus.serve")
LOSS = 0.01  # of the time of plain steps that may be lost with looking for what is not there
PATIENCE = 64  # tokens after which a request that had no use for drafts is looked at again at the latest
CERTAIN = 0.98  # how often a token comes that a rule leaves no choice of
FORGET, LEAST, WORST = 1 / 32, 32, 0.97  # of what drafts gained; after so many, less than this is a loss
FOLLOWED = 256  # tokens after which a block that was not asked about a request follows it no longer
SPREAD = 16  # drafts that have to make up for what a block was not told before
PROBE = 256  # cycles after which a block that nobody has asked for so long drafts a token


@dataclass(kw_only=True)
class Known:
    """Of one request: what became of its drafts, and when to look for one again. at: its tokens at the cycle before;
    asked: those when a block last drafted; led: whether one has, for it; gained, spent: seconds of plain steps that its
    cycles took the place of, and their own, as of late."""

    depths: Depths
    at: int
    asked: int
    led: bool = False
    history: History = field(default_factory=History)
    trust: MatchTrust = field(default_factory=MatchTrust)
    situation: Situation | None = None
    arm: str = "plain"
    pause: int = 0
    wait: int = 0
    cycles: int = 0
    gained: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Foretells how much of a copied draft comes true, from what it knows of the tokenizer's words."""

    predictor: Predictor
    spelling: Spelling


class Speculation:
    """For one engine. costs: of passes by their tokens, plain steps included; drafting: of a block by its tokens."""

    def __init__(
        self, forward: Forward, most: int, chain: Chain | None = None, judge: Judge | None = None,
        corpus: SuffixCache | None = None,
    ):  # fmt: skip
        self.forward, self.most, self.chain, self.judge = forward, most, chain, judge
        self.longest = min(most, judge.predictor.header.grid[-1]) if judge else most  # copied draft that is judged
        self.costs, self.drafting = Costs(), Costs()
        self.copies, self.depths, self.belief = Copies(corpus), Depths(DEEPEST), Belief()
        self.counts = {source: Counts() for source in SOURCES[1:]}
        self.known: dict[Request, Known] = {}
        self.began, self.alone = 0.0, False  # when the cycle under way did, and whether it is of one request
        self.catching, self.quiet = 0.0, 0  # seconds in which a block catches up a token; cycles since it was asked

    # ----- what to try ------------------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Request]) -> dict[Request, Proposal]:
        """What to try in the next pass over these requests, which have room for it; none for those that go plainly."""
        if self.all_wait(requests):
            return {}
        self.leave_off(requests)
        self.costs.rows = len(requests)
        self.costs.context = sum(len(request.tokens) for request in requests) / len(requests)
        step = self.costs.of(len(requests))
        if not step:
            return {}
        for request in requests:  # what is done once for a request is not what a look takes
            self.of(request)
        self.began, self.alone = time.perf_counter(), len(requests) == 1
        self.quiet += 1
        found = {request: offers for request in requests if (offers := [*self.candidates(request)])}
        chosen = self.choose(requests, found, step) if found else {}
        looked = (time.perf_counter() - self.began) / max(1, len(found))
        made = self.made(chosen, step / len(requests))
        proposals = {request: proposal for request, proposal in made.items() if proposal.tokens}
        for request in found:
            if request not in proposals:
                self.rest(self.known[request], looked, step)
        return proposals

    def all_wait(self, requests: Sequence[Request]) -> bool:
        """Nobody is to look for a draft in this cycle, as in most of those in which nothing is to be had."""
        known = [self.known.get(request) for request in requests]
        if not all(one is not None and one.wait > 0 for one in known):
            return False
        for one in known:
            assert one
            one.wait -= 1
        return True

    def leave_off(self, requests: Sequence[Request]) -> None:
        """What a block was not asked about is not kept for long, and is not worth telling it then."""
        for request in requests if self.chain is not None else ():
            known, berth = self.known.get(request), request.berth
            if berth and berth.behind and known and len(request.tokens) - known.asked > FOLLOWED:
                berth.behind = None

    def rest(self, known: Known, looked: float, step: float) -> None:
        """A look that found nothing to try took so long: the next one is later the longer that was."""
        known.pause = min(2 * known.pause + 1, PATIENCE, math.ceil(looked / (LOSS * step)))
        known.wait, known.arm = known.pause, "plain"

    def candidates(self, request: Request) -> Iterator[Candidate]:
        """What could be tried for a request. Nothing for one that failed before, or that waits."""
        room, known = min(self.most, request.limit - len(request.tokens) - 1), self.of(request)
        if known.wait > 0:
            known.wait -= 1
            return
        if room < 1 or request.apart:
            return
        if certain := next((tuple(run) for rule in reversed(request.rules) if (run := rule.coming())), ())[:room]:
            survival = [CERTAIN ** (at + 1) for at in range(len(certain))]
            yield Candidate(source="grammar", survival=survival, tokens=certain)
            return
        if copied := self.copies.draft(request, request.tenant, request.tokens, min(room, self.longest)):
            survival = self.survival(request, known, copied)
            yield Candidate(source="cache", survival=survival, tokens=copied.draft.tokens, copied=copied)
        if self.chain is not None and request.berth and request.berth.behind is not None:
            survival = known.depths.survival()[:room] if self.quiet < PROBE else [1.0]
            yield Candidate(source=self.chain.head.source, survival=survival, late=self.late(request) / SPREAD)

    def late(self, request: Request) -> float:
        """Seconds that a block takes to catch up, beyond those of a token."""
        return self.catching * max(0, len(request.tokens) - self.known[request].asked - 1)

    def survival(self, request: Request, known: Known, copied: Copied) -> list[float]:
        """Of a copied draft, by the predictor that was trained for the model, or by what came true before."""
        if self.judge is None:
            return known.trust.survival(copied.draft)
        return self.judge.predictor.survival(self.features(request, known, copied), len(copied.draft.tokens))

    def features(self, request: Request, known: Known, copied: Copied) -> np.ndarray:
        """What a predictor is told of a draft. There must be a judge."""
        assert self.judge and known.situation
        known.situation.read(request.tokens[known.situation.length :])
        return features_of(copied, known.situation, known.history)

    def of(self, request: Request) -> Known:
        known = self.known.get(request)
        if known is None:
            at = len(request.tokens)
            known = self.known[request] = Known(depths=Depths(DEEPEST, self.depths), at=at, asked=at)
            self.copies.text(request, request.tokens)
            if self.judge is not None:
                known.situation = Situation(self.judge.spelling, request.tokens[: request.prompt], request.limit)
        return known

    def choose(
        self, requests: Sequence[Request], found: dict[Request, list[Candidate]], step: float
    ) -> dict[Request, tuple[Candidate, int]]:
        """How many tokens of which candidate."""
        if len(requests) == 1:
            (request, candidates), *_ = found.items()
            look = time.perf_counter() - self.began
            offers = [one.offer(self.drafting, look) for one in candidates]
            choice = choose(offers, self.costs.of, before=self.known[request].arm)
            taken = next((one for one in candidates if one.source == choice.arm), None)
            return {request: (taken, choice.tokens)} if taken else {}
        best = {request: self.worthiest(candidates, len(requests), step) for request, candidates in found.items()}
        survivals = [one.survival if (one := best.get(request)) else () for request in requests]
        shares = share_out(survivals, self.costs.of)
        pairs = zip(requests, shares.tokens, strict=True)
        return {request: (one, size) for request, size in pairs if size and (one := best.get(request))}

    def worthiest(self, candidates: Sequence[Candidate], rows: int, step: float) -> Candidate | None:
        """By tokens that are expected, less those that could be had in the time that drafting takes."""

        def worth(one: Candidate) -> float:
            size = min(len(one.survival), DEEPEST)
            drafting = one.seconds(self.drafting, size)
            return sum(one.survival[:size]) - (math.inf if drafting is None else drafting) / step

        return max((one for one in candidates if worth(one) > 0), key=worth, default=None)

    def made(self, chosen: dict[Request, tuple[Candidate, int]], each: float) -> dict[Request, Proposal]:
        """The drafts themselves; requests for whose tokens there are no pages go plainly. each: seconds of a token."""
        berths, found, asked = self.forward.berths, dict[Request, Proposal](), dict[Request, int]()
        for request, (one, size) in chosen.items():
            if not size or request.berth is None or not berths.grow(request.berth, len(request.tokens) + size):
                continue
            if one.tokens:
                tokens = one.tokens[:size]
                found[request] = Proposal(source=one.source, tokens=tokens, whole=len(one.tokens), copied=one.copied)
            else:
                asked[request] = size
        return found | self.drafted(asked, each)

    def drafted(self, asked: dict[Request, int], each: float) -> dict[Request, Proposal]:
        """By the block. One that fails is not asked again, as no answer depends on it."""
        if self.chain is None or not asked:
            return {}
        begin, rows = time.perf_counter(), len(asked)
        try:
            found = self.chain.draft(asked, lambda _, probs: self.goes_on(probs, rows, each))
        except Exception as bad:
            self.give_up(bad)
            return {}
        if rows == 1:
            ((request, one),) = found.items()
            self.drafting.add(len(one.tokens), max(0.0, time.perf_counter() - begin - self.late(request)))
        self.quiet = 0
        for request in asked:
            self.known[request].asked, self.known[request].led = len(request.tokens), True
        return {
            request: Proposal(
                source=self.chain.head.source, tokens=one.tokens, whole=len(one.tokens), foretold=one
            )
            for request, one in found.items()
        }  # fmt: skip

    def goes_on(self, probs: Sequence[float], rows: int, each: float) -> bool:
        """One more token of a chain is worth the time that it takes."""
        size, survival = len(probs), self.belief.survival((*probs, sum(probs) / len(probs)))[-1]
        passes, blocks = (
            (costs.of(at + 1) or math.inf) - (costs.of(at) or 0.0)
            for costs, at in ((self.costs, rows + size), (self.drafting, size))
        )
        return survival * each > passes + blocks / rows

    # ----- what became of it ------------------------------------------------------------------------------------------

    def learn(self, request: Request, proposal: Proposal, accepted: int) -> None:
        """So many of the tokens that were proposed came true."""
        known, tried = self.known.get(request), len(proposal.tokens)
        if known is None:  # it has ended with an error
            return
        for _ in range(min(64, len(request.tokens) - known.at - accepted - 1)):
            known.history.add("plain", 0, 0)
        if proposal.source != "grammar":  # of which a history has no use: it is certain
            known.history.add(proposal.source, tried, accepted, trimmed=proposal.whole > tried)
        known.at, known.arm, known.pause, known.wait = len(request.tokens), proposal.source, 0, 0
        if proposal.copied is not None:
            known.trust.add(proposal.copied.draft.match, tried, accepted)
        if proposal.foretold is not None:
            known.depths.add(tried, accepted)
            self.belief.add(proposal.foretold.probs, accepted)
        count = self.counts[proposal.source]
        count.drafts, count.drafted, count.accepted = count.drafts + 1, count.drafted + tried, count.accepted + accepted
        if self.alone:
            self.settle(known, accepted + 1, time.perf_counter() - self.began)

    def settle(self, known: Known, tokens: int, seconds: float) -> None:
        """A request whose drafts have cost more than they brought goes plainly for a while."""
        step = self.costs.of(1) or 0.0
        known.cycles += 1
        known.gained += FORGET * (tokens * step - known.gained)
        known.spent += FORGET * (seconds - known.spent)
        if known.cycles >= LEAST and known.gained < WORST * known.spent:
            known.cycles, known.gained, known.spent, known.wait = 0, 0.0, 0.0, PATIENCE

    def finish(self, request: Request) -> None:
        """It has ended: what it says is known to those of the same tenant that come later."""
        self.known.pop(request, None)
        self.copies.finish(request, request.tenant, request.tokens[request.prompt :])

    def leave(self, request: Request) -> None:
        """What a block keeps of a request is to end where the model's own does: others may go on from there. A block
        that was not worth asking is not worth telling, either."""
        if self.chain is not None and request.berth is not None and request.berth.behind:
            if not self.of(request).led:
                request.berth.behind = None
                return
            try:
                self.chain.catch_up([request], leaving=True)
            except Exception as bad:
                self.give_up(bad)

    def give_up(self, bad: Exception) -> None:
        log.error("drafts of a block failed; there will be no more of them", exc_info=bad)
        self.chain = self.forward.watcher = None

    def forget(self) -> None:
        """The weights have changed."""
        if self.chain is not None:
            self.chain.forget()
