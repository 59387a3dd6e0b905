"""Ways to speculate, as an engine runs them.

| rule | what is tried in every cycle |
|--|--|
| `look_up` | what stood after the latest place of the last three tokens, up to ten tokens |
| `copies` | every copied draft, as a whole |
| `block(k)` | k tokens of the model's block or head |
| `by_score(k)` | a copied draft whose score promises three tokens, as a whole, else k tokens of the block |
| `by_paper(predictor, k)` | the same where more than six are expected: Hybrid Verified Decoding (arXiv 2606.01019) |
| `planned` | what was planned by who knows the answer |

Such rules try at every token, whatever it costs. Without a rule an arm is what `nautilus serve` runs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy

from nautilus.eval.speculation import Cycle, Draft
from nautilus.posttrain.policies import SCORE
from nautilus.posttrain.replay import common, looked_up
from nautilus.serve.draft.choice import PLAIN, TAU, Choice
from nautilus.serve.draft.copies import Copied
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.policy import Judge, Known, Speculation
from nautilus.serve.draft.predictor import Predictor
from nautilus.serve.draft.proposal import Candidate, Proposal
from nautilus.serve.request import Request

Pick = tuple[Candidate, int]  # of which draft how many tokens
Rule = Callable[["Arm", Request], Pick | None]


class Arm(Speculation):
    """One way to speculate in an engine whose speculation is `base`, for one request at a time; it keeps what became of
    the last one. answer, plan: of the request under way, for those who know them."""

    def __init__(self, base: Speculation, rule: Rule | None = None, *, judge: Judge | None = None):
        super().__init__(base.forward, base.most, base.chain, judge, base.copies.corpus)
        self.costs, self.drafting, self.rule = Timed(base.costs), deepcopy(base.drafting), rule
        self.catching = base.catching
        self.answer, self.plan = list[int](), list[Choice]()
        self.begin()

    def begin(self) -> None:
        """What follows is to be told of."""
        self.cycles, self.looked = list[Cycle](), list[tuple[int, tuple[int, ...], float]]()
        self.seconds, self.costs.total = defaultdict[str, float](float), 0.0

    def drafts(self) -> list[Draft]:
        """The copied drafts that were looked at, and how much of them comes true."""
        return [Draft(expected, common(tokens, self.answer, at)) for at, tokens, expected in self.looked]

    def spent(self, seconds: float) -> dict[str, float]:
        """Of so many seconds: looking for drafts and making them, predicting, passes, and all the rest."""
        draft, predict = self.seconds["draft"] - self.seconds["predict"], self.seconds["predict"]
        passes = self.costs.total
        return {"draft": draft, "predict": predict, "verify": passes, "commit": seconds - draft - predict - passes}

    # ----- what an engine asks for ------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Request]) -> dict[Request, Proposal]:
        begin = time.perf_counter()
        found = super().propose(requests) if self.rule is None else self.ruled(*requests)
        self.seconds["draft"] += time.perf_counter() - begin
        if not found:
            self.cycles.append(Cycle("plain", 1, 0))
        return found

    def ruled(self, request: Request) -> dict[Request, Proposal]:
        self.of(request)
        assert self.rule
        pick = self.rule(self, request) if self.room(request) > 0 else None
        made = self.made({request: pick}, 0.0) if pick else {}
        return {one: proposal for one, proposal in made.items() if proposal.tokens}

    def goes_on(self, probs: Sequence[float], rows: int, each: float) -> bool:
        return self.rule is not None or super().goes_on(probs, rows, each)

    def survival(self, request: Request, known: Known, copied: Copied) -> list[float]:
        begin = time.perf_counter()
        found = super().survival(request, known, copied)
        self.look(request, copied, sum(found) if self.judge else math.nan, begin)
        return found

    def look(self, request: Request, copied: Copied, expected: float, begin: float) -> None:
        self.seconds["predict"] += time.perf_counter() - begin
        self.looked.append((len(request.tokens) - request.prompt, copied.draft.tokens, expected))

    def learn(self, request: Request, proposal: Proposal, accepted: int) -> None:
        super().learn(request, proposal, accepted)
        self.cycles.append(Cycle(proposal.source, 1 + len(proposal.tokens), accepted))

    # ----- what rules ask for -----------------------------------------------------------------------------------------

    def room(self, request: Request) -> int:
        return min(self.most, request.limit - len(request.tokens) - 1)

    def copied(self, request: Request) -> Copied | None:
        return self.copies.draft(request, request.tenant, request.tokens, self.room(request))

    def asked(self, request: Request, depth: int) -> Pick | None:
        """So many tokens of the block."""
        if self.chain is None or depth < 1:
            return None
        return Candidate(source=self.chain.head.source, survival=()), min(depth, self.room(request))


class Timed(Costs):
    """Costs as another has them, that go on for themselves. total: seconds of passes."""

    def __init__(self, of: Costs):
        super().__init__()
        self.seconds, self.pace, self.total = dict(of.seconds), of.pace, 0.0
        self.each, self.apiece = of.each, of.apiece

    def add(self, size: int, seconds: float) -> None:
        self.total += seconds
        super().add(size, seconds)


def whole(copied: Copied) -> Pick:
    tokens = copied.draft.tokens
    return Candidate(source="cache", survival=(), tokens=tokens, copied=copied), len(tokens)


# ----- rules ----------------------------------------------------------------------------------------------------------


def look_up(arm: Arm, request: Request) -> Pick | None:
    tokens = tuple(looked_up(arm.copies.text(request, request.tokens), arm.room(request)))
    return (Candidate(source="cache", survival=(), tokens=tokens), len(tokens)) if tokens else None


def copies(arm: Arm, request: Request) -> Pick | None:
    copied = arm.copied(request)
    return whole(copied) if copied else None


def block(depth: int) -> Rule:
    return lambda arm, request: arm.asked(request, depth)


def by_score(depth: int, least: float = SCORE) -> Rule:
    def rule(arm: Arm, request: Request) -> Pick | None:
        copied = arm.copied(request)
        return whole(copied) if copied and copied.draft.score >= least else arm.asked(request, depth)

    return rule


def by_paper(predictor: Predictor, depth: int, tau: float = TAU) -> Rule:
    """The arm must have a judge, which spells for the predictor."""

    def rule(arm: Arm, request: Request) -> Pick | None:
        copied = arm.copied(request)
        if copied is None:
            return arm.asked(request, depth)
        begin = time.perf_counter()
        expected = predictor.expected(arm.features(request, arm.of(request), copied), len(copied.draft.tokens))
        arm.look(request, copied, expected, begin)
        return whole(copied) if expected > tau else arm.asked(request, depth)

    return rule


def planned(arm: Arm, request: Request) -> Pick | None:
    at = len(request.tokens) - request.prompt
    choice = arm.plan[at - 1] if at <= len(arm.plan) else PLAIN
    if choice.arm == "cache":
        tokens = tuple(arm.answer[at : at + choice.tokens])
        return (Candidate(source="cache", survival=(), tokens=tokens), len(tokens)) if tokens else None
    return arm.asked(request, choice.tokens)
