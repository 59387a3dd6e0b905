"""What may come next in an answer, beside what the model finds probable. Letters: V vocabulary, K tokens concerned.

    bias         logits + bias
    no end yet   -inf for the end tokens until min_tokens tokens are out
    bad tokens   -inf for a token that would complete a sequence that may not come
    repetition   l / r for l > 0, else l * r, for tokens of the prompt or the answer
    presence     l - p for tokens of the answer
    frequency    l - f n for tokens that the answer holds n times

in this order, then grammars, then the thinking budget. A rule changes what is drawn, never the log-prob that is told.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from nautilus.runtime import UserError
from nautilus.serve.sampling import Sampling


class Rule(Protocol):
    """Bounds what may come next in one answer. It sees every token of the answer in order, forced ones included.

    What is written here is the rule that bounds nothing.
    """

    def forced(self) -> int | None:
        """The token that must come next, if only one may; it is not drawn."""
        return None

    def coming(self) -> Sequence[int]:
        """Tokens that are all but certain to come next, in their order, as far as this rule knows: for drafts."""
        return ()

    def change(self, logits_V: Tensor) -> Tensor:
        """Logits (float64) in, the changed ones out, -inf where a token may not come; never in place."""
        return logits_V

    def add(self, token: int) -> None:
        """This token came."""
        return None

    def fork(self) -> Self:
        """An independent copy: what is added to one the other does not see."""
        return copy.copy(self)

    @property
    def ended(self) -> bool:
        """The answer is complete, by this rule: nothing may follow."""
        return False


class Bias(Rule):
    """Adds to the logits of some tokens, and bars the tokens `ends` before `min_tokens` others are out."""

    def __init__(self, biases: Mapping[int, float], ends: Collection[int] = (), min_tokens: int = 0):
        self.id_K = torch.tensor([*biases], dtype=torch.int64)
        self.bias_K = torch.tensor([*biases.values()], dtype=torch.float64)
        self.end_K = torch.tensor([*ends], dtype=torch.int64)
        self.missing = min_tokens

    def change(self, logits_V: Tensor) -> Tensor:
        logits_V = logits_V.index_add(0, self.id_K, self.bias_K)
        return logits_V.index_fill_(0, self.end_K, -math.inf) if self.missing > 0 else logits_V

    def add(self, token: int) -> None:
        self.missing -= 1


class BadTokens(Rule):
    """Bars each token that would complete one of the sequences; the prompt may hold the beginning of it."""

    def __init__(self, sequences: Sequence[Sequence[int]], prompt: Sequence[int] = ()):
        self.sequences = [tuple(sequence) for sequence in sequences]
        self.reach = max(map(len, self.sequences)) - 1
        self.recent = tuple(prompt[max(len(prompt) - self.reach, 0) :])

    def change(self, logits_V: Tensor) -> Tensor:
        barred = [last for *begin, last in self.sequences if self.recent[len(self.recent) - len(begin) :] == (*begin,)]
        return logits_V.index_fill(0, torch.tensor(barred, dtype=torch.int64), -math.inf) if barred else logits_V

    def add(self, token: int) -> None:
        recent = (*self.recent, token)
        self.recent = recent[max(len(recent) - self.reach, 0) :]


class Penalties(Rule):
    """Makes tokens that came before less probable: `repetition` those of the prompt too, the others the answer's."""

    def __init__(
        self, *, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0, prompt: Sequence[int] = ()
    ):
        self.repetition, self.presence, self.frequency = repetition, presence, frequency
        self.times = dict.fromkeys(prompt if repetition != 1 else (), 0)  # token → how often the answer holds it

    def change(self, logits_V: Tensor) -> Tensor:
        if not self.times:
            return logits_V
        id_K = torch.tensor([*self.times])
        times_K = torch.tensor([*self.times.values()], dtype=torch.float64)
        logits_K = logits_V[id_K]
        logits_K = torch.where(logits_K > 0, logits_K / self.repetition, logits_K * self.repetition)
        logits_K -= self.presence * times_K.clamp(max=1) + self.frequency * times_K
        return logits_V.index_copy(0, id_K, logits_K)

    def add(self, token: int) -> None:
        self.times[token] = self.times.get(token, 0) + 1

    def fork(self) -> Self:
        other = copy.copy(self)
        other.times = self.times.copy()
        return other


def rules_of(sampling: Sampling, prompt: Sequence[int], ends: Collection[int], vocab: int) -> list[Rule]:
    """The rules that a sampling implies for an answer to the prompt, in their order; none where it asks for none.

    ends: the tokens that end the answer. UserError for a token that a model of `vocab` tokens does not have.
    """
    known(sampling.logit_bias, vocab, "logit_bias")
    known([token for sequence in sampling.bad_tokens for token in sequence], vocab, "bad_tokens")
    rules: list[Rule] = []
    if sampling.logit_bias or sampling.min_tokens:
        possible = [token for token in ends if 0 <= token < vocab]  # a tokenizer may have more than the model
        rules.append(Bias(sampling.logit_bias, possible, sampling.min_tokens))
    if sampling.bad_tokens:
        rules.append(BadTokens(sampling.bad_tokens, prompt))
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if penalties != (1, 0, 0):
        repetition, presence, frequency = penalties
        rules.append(Penalties(repetition=repetition, presence=presence, frequency=frequency, prompt=prompt))
    return rules


def known(tokens: Collection[int], vocab: int, name: str) -> None:
    if strange := [token for token in tokens if token >= vocab]:
        raise UserError(
            f"sampling.{name} names token {strange[0]}, the model knows 0 to {vocab - 1}; use ids of its own tokenizer"
        )
