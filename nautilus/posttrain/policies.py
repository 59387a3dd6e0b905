"""Ways to choose what is drafted, and how fast recorded answers would have come under each, by a table of costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nautilus.posttrain.replay import MODEL, Moment, Policy, replay
from nautilus.posttrain.traces import Trace
from nautilus.serve.draft.choice import PLAIN, TAU, Choice, Offer, choose, whole_or_not
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.predictor import Predictor

SCORE = 3.0  # from which on a draft is tried without a predictor


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds: of passes by their tokens, of looking for a copied draft and deciding, of a draft token of a model."""

    passes: Mapping[int, float]
    look: float = 0.0
    model: float = 0.0

    @staticmethod
    def of(costs: Costs, **more: float) -> Prices:
        """Between sizes that were measured, on the line between them."""
        known = {size: costs.of(size) for size in range(1, max(costs.seconds) + 1)}
        return Prices(passes={size: seconds for size, seconds in known.items() if seconds is not None}, **more)

    def drafting(self, tokens: int) -> float:
        return self.model * tokens

    def cycle(self, choice: Choice, look: bool) -> float:
        drafting = self.drafting(choice.tokens) if choice.arm == MODEL else 0.0
        return self.passes[1 + choice.tokens] + drafting + (self.look if look else 0.0)


@dataclass(kw_only=True)
class Outcome:
    """What came of a policy. By arm: cycles, tokens that they gave, draft tokens, those that came true."""

    name: str
    seconds: float = 0.0
    cycles: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens.total() / self.seconds if self.seconds else 0.0

    def add(self, choice: Choice, accepted: int, tokens: int, seconds: float) -> None:
        self.seconds += seconds
        self.cycles[choice.arm] += 1
        self.tokens[choice.arm] += tokens
        self.drafted[choice.arm] += choice.tokens
        self.accepted[choice.arm] += accepted


def simulate(
    name: str, traces: Sequence[Trace], policy: Policy, prices: Prices, spelling: Spelling, *, most: int,
    of: Container[int] | None = None, look: bool = True,
) -> Outcome:  # fmt: skip
    """look: the policy looks for a copied draft in every cycle."""
    found = Outcome(name=name)
    for moment, choice in replay(traces, policy, spelling, most=most, of=of):
        assert choice is not None
        accepted = moment.accepted(choice)
        tokens = min(accepted + 1, len(moment.trace.answer) - moment.at)
        found.add(choice, accepted, tokens, prices.cycle(choice, look))
    return found


# ----- policies -------------------------------------------------------------------------------------------------------


def plain(moment: Moment) -> Choice:
    return PLAIN


def prompt_lookup(moment: Moment) -> Choice:
    """What stood after the last three tokens before, in this request."""
    tokens = len(moment.looked_up("lookup"))
    return Choice(arm="lookup", tokens=tokens) if tokens else PLAIN


def by_precedence(depth: int = 0) -> Policy:
    """What stood after the last twelve tokens before, else the model: llama.cpp asks the kinds of drafts that need no
    model first, with these sizes."""

    def choice(moment: Moment) -> Choice:
        tokens = len(moment.looked_up("ngram"))
        return Choice(arm="ngram", tokens=tokens) if tokens else otherwise(moment, depth)

    return choice


def suffix_only(moment: Moment) -> Choice:
    """Every copied draft, as a whole."""
    return whole(moment) or PLAIN


def whole(moment: Moment) -> Choice | None:
    return Choice(arm="cache", tokens=moment.length) if moment.copied else None


def model_only(depth: int) -> Policy:
    """So many tokens of the model in every cycle."""
    return lambda moment: otherwise(moment, depth)


def otherwise(moment: Moment, depth: int) -> Choice:
    tokens = min(depth, moment.room) if moment.trace.depths else 0
    return Choice(arm=MODEL, tokens=tokens) if tokens else PLAIN


def by_score(least: float = SCORE, depth: int = 0) -> Policy:
    """A copied draft whose score says that so many tokens come true, else the model."""

    def choice(moment: Moment) -> Choice:
        good = moment.copied is not None and moment.copied.draft.score >= least
        return (whole(moment) if good else None) or otherwise(moment, depth)

    return choice


def by_paper(predictor: Predictor, depth: int = 0, tau: float = TAU) -> Policy:
    """All of a copied draft from which more than tau tokens are expected, else the model."""

    def choice(moment: Moment) -> Choice:
        if moment.copied is None:
            return otherwise(moment, depth)
        expected = predictor.expected(moment.features(), moment.length)
        return whole_or_not(expected, moment.length, otherwise=otherwise(moment, depth), tau=tau)

    return choice


def by_rate(predictor: Predictor, prices: Prices, depth: int = 0) -> Policy:
    """What gives most tokens in a second."""

    def choice(moment: Moment) -> Choice:
        offers = []
        if moment.copied is not None:
            survival = predictor.survival(moment.features(), moment.length)
            offers.append(Offer(arm="cache", survival=survival, lengths=predictor.header.grid))
        if deepest := otherwise(moment, depth).tokens:
            survival = moment.model.survival()[:deepest]
            lengths = range(1, deepest + 1)
            offers.append(Offer(arm=MODEL, survival=survival, lengths=lengths, seconds=prices.drafting))
        return choose(offers, prices.passes.get, before=moment.before)

    return choice


def by_truth(prices: Prices, depth: int = 0) -> Policy:
    """Knows of every copied draft how much of it comes true, and of the model's drafts no more than others: the oracle
    of Hybrid Verified Decoding, with what gives most tokens in a second in the place of its rule."""

    def choice(moment: Moment) -> Choice:
        offers = [Offer(arm="cache", survival=[1.0] * moment.true, lengths=range(1, moment.true + 1))]
        if deepest := otherwise(moment, depth).tokens:
            survival, lengths = moment.model.survival()[:deepest], range(1, deepest + 1)
            offers.append(Offer(arm=MODEL, survival=survival, lengths=lengths, seconds=prices.drafting))
        return choose(offers, prices.passes.get, gain=1.0)

    return choice


def by_oracle(
    traces: Sequence[Trace], prices: Prices, spelling: Spelling, *, most: int, of: Container[int] | None = None,
    depth: int = 0,
) -> Policy:  # fmt: skip
    """Knows what will come true, and takes the way through each answer that needs least time: no choice among the same
    drafts is faster. What it does not copy it does not look for."""
    known = plans(traces, prices, spelling, most=most, of=of, depth=depth)
    return lambda moment: known[moment.number][moment.at - 1]


def followed(
    traces: Sequence[Trace], policy: Policy, spelling: Spelling, *, most: int
) -> dict[int, list[Choice]]:  # fmt: skip
    """By the number of a trace: what the policy chose at each place of its answer after the first; nothing between."""
    found = {number: [PLAIN] * len(trace.answer) for number, trace in enumerate(traces)}
    for moment, choice in replay(traces, policy, spelling, most=most):
        found[moment.number][moment.at - 1] = choice or PLAIN
    return found


def plans(
    traces: Sequence[Trace], prices: Prices, spelling: Spelling, *, most: int, of: Container[int] | None = None,
    depth: int = 0,
) -> dict[int, list[Choice]]:  # fmt: skip
    """By the number of a trace: the best choice at each place of its answer after the first."""
    found: dict[int, list[Choice]] = {}
    moments: list[Moment] = []
    for moment, _ in replay(traces, plain, spelling, most=most, of=of):
        moments.append(moment)
        if moment.at == len(moment.trace.answer) - 1:
            found[moment.number] = shortest(moments, prices, depth)
            moments = []
    return found


def shortest(moments: Sequence[Moment], prices: Prices, depth: int) -> list[Choice]:
    """The choice at each moment of one answer that leads to its end in the least time."""
    count = len(moments)
    left, chosen = [0.0] * (count + 1), [PLAIN] * count
    for at in range(count - 1, -1, -1):
        ways = [
            (prices.cycle(one, one.arm == "cache") + left[min(count, at + 1 + one.tokens)], one.tokens, one)
            for one in true_ones(moments[at], prices, depth)
        ]
        left[at], _, chosen[at] = min(ways, key=lambda way: way[:2])
    return chosen


def true_ones(moment: Moment, prices: Prices, depth: int) -> Iterator[Choice]:
    """All drafts that come true as a whole. A longer one costs no less."""
    yield PLAIN
    for arm, most in (("cache", moment.true), (MODEL, min(moment.depth, otherwise(moment, depth).tokens))):
        yield from (Choice(arm=arm, tokens=tokens) for tokens in range(1, most + 1) if 1 + tokens in prices.passes)
