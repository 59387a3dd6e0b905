"""What a prompt costs: the log-probs of its tokens, found while the model reads it. Letters: R rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nautilus.serve.sample import BrokenLogits, Drawn, looked_at, told


class PromptScores:
    """`found` has as many of a prompt's tokens as have been scored, in order, each with its `tops` alternatives.

    The first has no log-prob (nan), for nothing stands before it. The others have those that they would be told with
    had the model answered with them: float64, of its own logits.
    """

    def __init__(self, tokens: Sequence[int], tops: int):
        self.tokens, self.tops = tuple(tokens), tops
        self.found = [Drawn(self.tokens[0], math.nan, ())]

    @property
    def complete(self) -> bool:
        return len(self.found) == len(self.tokens)

    def add(self, at: int, logits_RV: Tensor) -> None:
        """The logits after the tokens from `at` on. A part that is read again is not scored again. BrokenLogits where
        they are no numbers."""
        known = len(self.found)
        rows_RV = logits_RV[known - 1 - at : len(self.tokens) - 1 - at]
        for token, logits in zip(self.tokens[known:], looked_at(rows_RV), strict=False):
            if math.isnan(logits.total):
                raise BrokenLogits(
                    f"the log-prob of token {len(self.found)} of the prompt was asked for, but the model's logits hold"
                    " NaN or infinity there; load an earlier checkpoint or a wider number format"
                )
            self.found.append(told(logits, token, self.tops))
