"""What a request asks of its answer: how tokens are chosen, what bounds them, when it ends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nautilus.config import setting
from nautilus.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen and when it ends. What ends an answer is not part of its text."""

    temperature: float = setting(1.0, "0 takes the most probable token, 1 draws from the model")
    top_k: int = setting(0, "draw from the k most probable tokens (0: all)")
    top_p: float = setting(1.0, "draw from the fewest tokens with this share (1: all)")
    min_p: float = setting(0.0, "least probability, as a part of the highest (0: all)")
    seed: int = setting(0, "same seed, same answer")
    max_tokens: int = setting(256, "longest answer in tokens")
    min_tokens: int = setting(0, "no end of the answer before so many tokens")
    stop: tuple[str, ...] = setting((), "strings that end an answer")
    stop_tokens: tuple[int, ...] = setting((), "tokens that end an answer, with the model's own")
    ignore_eos: bool = setting(False, "go on past the model's own end tokens")
    repetition_penalty: float = setting(1.0, "above 1: tokens of the prompt and answer come less often again")
    presence_penalty: float = setting(0.0, "taken off the logits of tokens that the answer holds already")
    frequency_penalty: float = setting(0.0, "the same, once for every time that it holds them")
    thinking_budget: int | None = setting(
        None, "reasoning is closed at the first line end after so many tokens (none: never)"
    )
    thinking_grace: int = setting(0, "at the latest after so many more")
    # For callers in code: what no word on a command line spells, or what a terminal does not show.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False, metadata={"setting": False})
    bad_tokens: tuple[tuple[int, ...], ...] = field(default=(), metadata={"setting": False})
    top_logprobs: int = field(default=0, metadata={"setting": False})

    def __post_init__(self):
        for name, (holds, advice) in VALID.items():
            if not holds(getattr(self, name)):
                raise UserError(f"sampling.{name}={getattr(self, name)!r} was asked for; it must {advice}")
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f"sampling.min_tokens={self.min_tokens!r} was asked for with max_tokens={self.max_tokens!r}, so that "
                "no answer has both; lower the one or raise the other"
            )

    def ends(self, own: Iterable[int]) -> frozenset[int]:
        """The tokens that end an answer of a model whose own end tokens are `own`."""
        return frozenset(self.stop_tokens) | (frozenset() if self.ignore_eos else frozenset(own))


def whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def count(value: Any) -> bool:
    return whole(value) and value >= 0


def real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: real(value) and low <= value <= high


def listed(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def biases(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(count, value)) and all(map(within(-100, 100), value.values()))


# Field → what its value satisfies, and the end of the sentence "it must …".
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: real(value) and 0 <= value < math.inf, "be 0 (greedy) or positive"),
    "top_k": (count, "be 0 (keep all tokens) or how many to keep, a whole number"),
    "top_p": (lambda value: real(value) and 0 < value <= 1, "lie in (0, 1]; 1 keeps all tokens"),
    "min_p": (within(0, 1), "lie in [0, 1]; 0 keeps all tokens"),
    "seed": (lambda value: count(value) and value < 1 << 64, "be a whole number in [0, 2^64); choose another"),
    "max_tokens": (
        lambda value: count(value) and value >= 1,
        "be a whole number, at least 1; ask for a token or more",
    ),
    "min_tokens": (count, "be a whole number, 0 or more"),
    "stop": (lambda value: listed(value, text), "be a tuple of strings that are not empty, such as ('###',)"),
    "stop_tokens": (lambda value: listed(value, whole), "be a tuple of token ids"),
    "ignore_eos": (lambda value: isinstance(value, bool), "be True or False"),
    # Beyond these a logit times or through it is infinite, so that nothing can be drawn.
    "repetition_penalty": (within(1e-6, 1e6), "lie in [1e-6, 1e6]; 1 changes nothing"),
    "presence_penalty": (within(-2, 2), "lie in [-2, 2]; 0 changes nothing"),
    "frequency_penalty": (within(-2, 2), "lie in [-2, 2]; 0 changes nothing"),
    "thinking_budget": (lambda value: value is None or count(value), "be None (no limit) or a whole number, 0 or more"),
    "thinking_grace": (count, "be a whole number, 0 or more"),
    "logit_bias": (biases, "map token ids to numbers in [-100, 100], such as {13: -5.0}"),
    "bad_tokens": (
        lambda value: listed(value, lambda tokens: bool(tokens) and listed(tokens, count)),
        "be a tuple of tuples of token ids, none of them empty",
    ),
    "top_logprobs": (count, "be a whole number, 0 or more"),
}
