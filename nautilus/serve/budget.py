"""The thinking budget: reasoning is closed for the model once it has had its tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError
from nautilus.serve.markers import OPEN, THOUGHT
from nautilus.serve.rules import Rule
from nautilus.serve.sampling import Sampling


class ThinkingBudget(Rule):
    """Closes a thinking block, within which the answer begins, by writing `end_ids` itself.

    It begins to where `budget` tokens are out and the last one ends a line, at the latest where budget + grace are; of
    end_ids it writes what is not there yet. So reasoning and its end are at most budget + grace + len(end_ids) tokens.
    The block begins with a line: a budget of 0 closes it with the first token. Once it is closed, by whom does not
    matter, this rule bounds nothing any more.

    newline_ids: the tokens that end a line. closing_ids: tokens each of which ends the block without end_ids, such as
    the beginning of a tool call.
    """

    def __init__(
        self,
        budget: int,
        grace: int,
        end_ids: Sequence[int],
        newline_ids: Collection[int],
        closing_ids: Collection[int] = (),
    ):
        if not end_ids:
            raise UserError("a thinking budget was asked for without tokens that close a thinking block; name them")
        self.budget, self.grace, self.end_ids = budget, grace, tuple(end_ids)
        self.newline_ids, self.closing_ids = newline_ids, closing_ids
        self.out = 0  # tokens of the answer
        self.recent: tuple[int, ...] = ()  # the last of them, as many as could be the end
        self.closed, self.closing = False, budget == 0

    def forced(self) -> int | None:
        return self.end_ids[self.begun()] if self.closing and not self.closed else None

    def coming(self) -> Sequence[int]:
        return self.end_ids[self.begun() :] if self.closing and not self.closed else ()

    def begun(self) -> int:
        """How many of end_ids the answer ends with; less than all while the block is open."""
        sizes = range(min(len(self.recent), len(self.end_ids)), 0, -1)
        return next((size for size in sizes if self.recent[-size:] == self.end_ids[:size]), 0)

    def add(self, token: int) -> None:
        if self.closed:
            return
        self.out += 1
        self.recent = (*self.recent, token)[-len(self.end_ids) :]
        self.closed = token in self.closing_ids or self.begun() == len(self.end_ids)
        at_line_end = self.out >= self.budget and token in self.newline_ids
        self.closing = self.closing or at_line_end or self.out >= self.budget + self.grace


def thinking_rules(
    sampling: Sampling, tokenizer: Tokenizer, *, inside: bool, end_ids: Sequence[int] = ()
) -> list[Rule]:
    """The budget that a sampling asks for, if any; it goes behind all other rules.

    inside: the answer begins within a thinking block; elsewhere there is nothing to close. end_ids: the tokens that
    close a block, by default those of `</think>`.
    """
    if sampling.thinking_budget is None or not inside:
        return []
    end_ids = end_ids or tokenizer.encode(THOUGHT, control=True)
    # A model that begins a call has thought to its end, whether it says so or not.
    calls = {id for word, id in tokenizer.control.items() if word == OPEN}
    return [ThinkingBudget(sampling.thinking_budget, sampling.thinking_grace, end_ids, tokenizer.newline_ids, calls)]
