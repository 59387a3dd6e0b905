"""Recorded answers, gone through once more as an engine would have: drafts, features, and what would have come true.

An engine that drafts gives the same tokens, only in other steps. So a recorded answer tells of every draft how many of
its tokens are right, without the model. What drafts are copied from is what there was at that moment: the request so
far, and the answers before it in the order of their arrival, each from its end on, so that no draft knows the future.
What a policy chooses decides where the next cycle begins; history is that of these cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nautilus.posttrain.traces import Trace
from nautilus.serve.draft.choice import Choice
from nautilus.serve.draft.copies import Copied, Copies
from nautilus.serve.draft.features import Situation, Spelling, features_of
from nautilus.serve.draft.history import Depths, History
from nautilus.serve.draft.suffix import SuffixCache

MODEL = "mtp"  # the arm whose drafts come from a model
LOOKED_UP = {"lookup": (3, 10), "ngram": (12, 48)}  # tokens that must be the same, and that are copied then
DEEPEST = 8  # of a model's drafts


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A decode state. at: tokens of the answer that are there; room: most draft tokens; copied: the draft; true: how
    many of its tokens come true; depth: how many of the model's; before: the arm of the cycle before. The rest goes on
    with the request, and is of this moment only until the next one."""

    number: int
    trace: Trace
    at: int
    room: int
    copied: Copied | None
    true: int
    depth: int
    before: str
    situation: Situation
    history: History
    model: Depths
    own: SuffixCache

    @property
    def length(self) -> int:
        return len(self.copied.draft.tokens) if self.copied else 0

    def features(self) -> np.ndarray:
        assert self.copied
        return features_of(self.copied, self.situation, self.history)

    def looked_up(self, arm: str) -> Sequence[int]:
        return looked_up(self.own, self.room, *LOOKED_UP[arm])

    def accepted(self, choice: Choice) -> int:
        """How many of the chosen draft tokens come true."""
        if choice.arm in LOOKED_UP:
            return common(self.looked_up(choice.arm)[: choice.tokens], self.trace.answer, self.at)
        return min(choice.tokens, {"cache": self.true, MODEL: self.depth}.get(choice.arm, 0))


Policy = Callable[[Moment], Choice]


def replay(
    traces: Sequence[Trace], policy: Policy, spelling: Spelling, *, most: int, of: Container[int] | None = None,
    every: bool = False,
) -> Iterator[tuple[Moment, Choice | None]]:  # fmt: skip
    """The cycles of all traces: what there was, and what the policy chose.

    most: draft tokens; of: the numbers of those that are gone through, others are only there to copy from; every: the
    moments between cycles too, at which nothing is chosen.
    """
    copies, everyone = Copies(), Depths(DEEPEST)
    for number, trace in enumerate(traces):
        if of is None or number in of:
            request = Replayed(number, trace, copies, spelling, everyone, most)
            yield from request.cycles(policy, every)
        copies.finish(number, trace.tenant, trace.answer)


class Replayed:
    """One request under way. Its first token comes of reading the prompt, so its first cycle is the one after that."""

    def __init__(
        self, number: int, trace: Trace, copies: Copies, spelling: Spelling, everyone: Depths, most: int
    ):  # fmt: skip
        self.number, self.trace, self.copies, self.most = number, trace, copies, most
        self.tokens, self.at, self.before = [*trace.prompt], 0, "plain"
        self.situation, self.history = Situation(spelling, trace.prompt, trace.limit), History()
        self.model = Depths(DEEPEST, everyone)
        self.go_on(1)

    def cycles(self, policy: Policy, every: bool) -> Iterator[tuple[Moment, Choice | None]]:
        due, end = self.at, len(self.trace.answer)
        while self.at < end:
            moment = self.moment()
            if self.at < due:
                yield moment, None
            else:
                choice = policy(moment)
                yield moment, choice
                due = self.at + self.learn(moment, choice) + 1
            self.go_on(min(due, end, self.at + 1 if every else end))

    def moment(self) -> Moment:
        trace, room = self.trace, min(self.most, self.trace.limit - len(self.tokens) - 1)
        own = self.copies.text(self.number, self.tokens)
        copied = self.copies.draft(self.number, trace.tenant, self.tokens, room) if room > 0 else None
        return Moment(
            number=self.number, trace=trace, at=self.at, room=max(0, room), copied=copied,
            true=common(copied.draft.tokens, trace.answer, self.at) if copied else 0,
            depth=trace.depths[self.at] if trace.depths else 0,
            before=self.before, situation=self.situation, history=self.history, model=self.model, own=own,
        )  # fmt: skip

    def learn(self, moment: Moment, choice: Choice) -> int:
        accepted = moment.accepted(choice)
        whole = moment.length if choice.arm == "cache" else choice.tokens
        self.history.add(choice.arm, choice.tokens, accepted, trimmed=choice.tokens < whole)
        if choice.arm == MODEL:
            self.model.add(choice.tokens, accepted)
        self.before = choice.arm
        return accepted

    def go_on(self, at: int) -> None:
        following = self.trace.answer[self.at : at]
        self.tokens += following
        self.situation.read(following)
        self.at = at


def looked_up(own: SuffixCache, room: int, word: int = 3, most: int = 10) -> Sequence[int]:
    """The draft of prompt look-up: what came after the latest place of the last `word` tokens in a request's text."""
    tokens, rows = own.tokens, next(rows for rows in own.rows if rows.width <= word)
    for place in rows.places(tokens):
        if place < len(tokens) - 1 and tokens[max(0, place + 1 - word) : place + 1] == tokens[-word:]:
            return tokens[place + 1 : place + 1 + min(most, room)]
    return ()


def common(draft: Sequence[int], answer: Sequence[int], at: int) -> int:
    """How many tokens the draft has in common with the answer from place `at` on."""
    found = 0
    for token, said in zip(draft, answer[at : at + len(draft)], strict=False):
        if token != said:
            break
        found += 1
    return found
