"""What is known of a copied draft before it is verified, as numbers: from these its pay-off is predicted.

After Hybrid Verified Decoding (arXiv 2606.01019): how well the draft matches, where the answer stands, what became of
the drafts before, what kinds of text the draft holds. The engine and the replay of recorded answers share this code, or
a predictor would be asked for something else than it has learned.

    spelling = Spelling(tokenizer)                                    once
    situation, history = Situation(spelling, tokens, limit), History()         for each request
    features_of(copied, situation, history)                           every cycle; then
    history.add("cache", 8, 5); situation.read(tokens[-6:])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.draft.copies import Copied
from nautilus.serve.draft.history import History
from nautilus.serve.markers import THINK, THOUGHT

VERSION = 2  # of the features: a predictor of another one does not fit
AHEAD = 8  # first tokens of a draft over whose probabilities the least and the mean are taken
LOOKED = 16  # first tokens of a draft whose kinds are counted
CALL, CALLED = "<tool_call>", "</tool_call>"
TICK = ord("`")
KINDS = ("letters", "digits", "blanks", "lines", "brackets", "quotes", "marks", "control")
NAMES = (
    "score", "match", "length", "first_prob", "least_prob", "mean_prob", "kinds", "entropy", "places", "shared",
    "corpus", "age",
    "prompt", "answered", "answered_share", "reasoning", "code",
    "chosen_16", "chosen_64", "accepted_1", "accepted_4", "accepted_share", "since_wrong", "model_first", "trimmed",
    *KINDS,
)  # fmt: skip


class Spelling:
    """What features need of a tokenizer: the kind of text of every token, and which ones open or close something."""

    def __init__(self, tokenizer: Tokenizer):
        texts = tokenizer.token_bytes
        self.kinds = bytes(
            KINDS.index("control") if token in tokenizer.control_ids else kind_of(text)
            for token, text in enumerate(texts)
        )
        self.ticks = {token: text for token, text in enumerate(texts) if TICK in text}
        words = {
            THINK: ("reasoning", True),
            THOUGHT: ("reasoning", False),
            CALL: ("call", True),
            CALLED: ("call", False),
        }
        control = tokenizer.control
        self.tags = {control[word]: change for word, change in words.items() if word in control}
        self.end = tokenizer.eos

    def shares(self, tokens: Sequence[int]) -> list[float]:
        """Of each kind among these tokens; those that the tokenizer does not know count as control tokens."""
        counts, kinds = [0] * len(KINDS), self.kinds
        for token in tokens:
            counts[kinds[token] if token < len(kinds) else -1] += 1
        return [count / len(tokens) for count in counts]


def kind_of(text: bytes) -> int:
    """By its first byte that is not blank; one that has a line end is of that kind, whatever else it has."""
    if b"\n" in text or b"\r" in text:
        return KINDS.index("lines")
    rest = text.strip()
    if not rest:
        return KINDS.index("blanks")
    first = rest[:1]
    if first.isalpha() or first[0] >= 0x80:
        return KINDS.index("letters")
    if first.isdigit():
        return KINDS.index("digits")
    return KINDS.index("brackets" if first in b"()[]{}<>" else "quotes" if first in b"\"'`" else "marks")


class Situation:
    """Where the text of one request stands. limit: most tokens of it, prompt and answer together."""

    def __init__(self, spelling: Spelling, prompt: Sequence[int], limit: int):
        self.spelling, self.prompt, self.limit = spelling, len(prompt), limit
        self.length = self.run = 0
        self.reasoning = self.call = self.fenced = False
        self.read(prompt)

    def read(self, tokens: Sequence[int]) -> None:
        """The next tokens of the text."""
        ticks, tags, end = self.spelling.ticks, self.spelling.tags, self.spelling.end
        self.length += len(tokens)
        for token in tokens:
            if token in ticks:
                self.count_ticks(ticks[token])
                continue
            self.run = 0
            if token in tags:
                setattr(self, *tags[token])
            elif token == end:
                self.reasoning = self.call = self.fenced = False

    def count_ticks(self, text: bytes) -> None:
        """Three in a row open or close a block of code."""
        for byte in text:
            self.run = self.run + 1 if byte == TICK else 0
            if self.run == 3:
                self.fenced = not self.fenced


def features_of(copied: Copied, situation: Situation, history: History) -> np.ndarray:
    """One float32 number for each of NAMES; numbers of tokens as log(1 + n)."""
    draft, log = copied.draft, math.log1p
    probs, answered = draft.probs[:AHEAD], situation.length - situation.prompt
    shares, accepted = history.shares, history.accepted
    return np.array(
        [
            draft.score, log(draft.match), log(len(draft.tokens)), probs[0], min(probs), sum(probs) / len(probs),
            log(draft.kinds), draft.entropy, log(draft.places), copied.origin == "tenant",
            copied.origin == "corpus", log(draft.age),
            log(situation.prompt), log(answered), answered / max(1, situation.limit - situation.prompt),
            situation.reasoning, situation.call or situation.fenced,
            (history.chosen & 0xFFFF).bit_count() / 16, history.chosen.bit_count() / 64,
            log(accepted[0]), log(sum(accepted) / 4), sum(shares) / len(shares) if shares else 0.0,
            log(history.since), history.first, history.trimmed, *situation.spelling.shares(draft.tokens[:LOOKED]),
        ],
        dtype=np.float32,
    )  # fmt: skip
