"""Drafts copied from text that was seen: where the last tokens stood before, what came after them?

SuffixDecoding (arXiv 2411.04975) keeps counted suffix trees for that. A list serves as well: for the tokens in a row
that end at each place, where the same ones ended before. It takes half a microsecond a token, bounds neither match nor
draft, and knows how old a match is.

    cache = SuffixCache()
    cache.extend([5, 6, 7, 8, 9, 5, 6, 7])
    cache.draft(cache.tokens, 4).tokens      (8, 9, 5, 6)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WIDTHS = (8, 3)  # of what is looked up: tokens in a row, the longer first
PLACES = 32  # the latest ones of each width
MATCH = 64  # tokens over which a match is measured
LEAST = 0.1  # share of the places that agree, below which a draft ends
BETWEEN = -1  # stands between texts; no token is equal to it
STRIDE = 8  # tokens that are compared at once
MANY = 24  # tokens that are added, from which on their keys are computed at once
BASE, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Tokens that may come next.

    probs: of each, the share of the places that go on so far. score: their sum, an estimate of how many come true.
    match: tokens before them that are the same. places: where these stood. kinds, entropy: how many tokens followed
    there, and the entropy of their counts in nats. age: tokens since the latest of the places.
    """

    tokens: tuple[int, ...]
    probs: tuple[float, ...]
    match: int
    places: int
    kinds: int
    entropy: float
    age: int

    @property
    def score(self) -> float:
        return sum(self.probs)


class Rows:
    """Where the same `width` tokens in a row ended before."""

    def __init__(self, width: int):
        self.width, self.key, self.oldest = width, 0, pow(BASE, width - 1, 1 << 64)
        self.latest: dict[int, int] = {}  # by key
        self.before: list[int] = []  # of each place, the one before it with the same key

    def add(self, tokens: Sequence[int], begin: int) -> None:
        """Those from `begin` on."""
        latest, before = self.latest, self.before
        for place, key in enumerate(self.keys(tokens, begin), begin):
            before.append(latest.get(key, -1))
            latest[key] = place
            self.key = key

    def keys(self, tokens: Sequence[int], begin: int) -> Iterable[int]:
        """Of the last tokens at each place from `begin` on, modulo 2^64; before the first there are noughts."""
        if len(tokens) - begin >= MANY:
            return keys_of(tokens[max(0, begin - self.width + 1) :], self.width)[-(len(tokens) - begin) :].tolist()
        return self.rolled(tokens, begin)

    def rolled(self, tokens: Sequence[int], begin: int) -> Iterator[int]:
        width, oldest, key = self.width, self.oldest, self.key
        for place in range(begin, len(tokens)):
            left = tokens[place - width] if place >= width else 0
            key = ((key - left * oldest) * BASE + tokens[place]) & MASK
            yield key

    def places(self, context: Sequence[int]) -> Iterator[int]:
        """The latest first. Different tokens may have one key, so these are places to look at, no more."""
        if len(context) < self.width:
            return
        key = 0
        for token in context[len(context) - self.width :]:
            key = (key * BASE + token) & MASK
        place = self.latest.get(key, -1)
        while place >= 0:
            yield place
            place = self.before[place]


def keys_of(tokens: Sequence[int], width: int) -> np.ndarray:
    """sum_i tokens[t - i] BASE^i over `width` tokens, modulo 2^64, for every t at once."""
    tokens_T = np.array(tokens, np.int64).view(np.uint64)
    keys_T = tokens_T.copy()
    for back in range(1, width):
        keys_T[back:] += tokens_T[:-back] * np.uint64(pow(BASE, back, 1 << 64))
    return keys_T


class SuffixCache:
    """Texts that drafts are copied from; the latest `most` tokens of them, or all.

    A text that goes on is extended; the next one begins with `begin`.
    """

    def __init__(self, most: int | None = None):
        self.most = most
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = []
        self.rows = [Rows(width) for width in WIDTHS]

    def begin(self) -> None:
        if self.tokens:
            self.extend([BETWEEN])

    def extend(self, tokens: Iterable[int]) -> None:
        begin = len(self.tokens)
        self.tokens.extend(tokens)
        if self.most is not None and len(self.tokens) > 2 * self.most:
            kept = self.tokens[-self.most :]
            self.clear()
            # What was cut in two goes as a whole, unless it is all there is.
            begin, self.tokens = 0, kept[kept.index(BETWEEN) + 1 :] if BETWEEN in kept else kept
        for rows in self.rows:
            rows.add(self.tokens, begin)

    def draft(self, context: Sequence[int], most: int) -> Draft | None:
        """At most so many tokens after the context, which may be these tokens themselves; None where nothing like its
        end is known. Of all lengths of the match, that whose draft has the highest score, then the longest."""
        found = self.matches(context)
        best = None
        for match in sorted({length for length in found.values()}, reverse=True):
            places = [place for place, length in found.items() if length >= match]
            draft = self.vote(places, match, most)
            if draft is not None and (best is None or draft.score > best.score):
                best = draft
        return best

    def matches(self, context: Sequence[int]) -> dict[int, int]:
        """Places whose tokens, they included, are those at the end of the context, and how many are the same."""
        own, found = len(self.tokens) - 1 if context is self.tokens else -1, dict[int, int]()
        for rows in self.rows:
            looked = 0
            for place in rows.places(context):
                if place == own:
                    continue
                if place not in found and (length := self.common(context, place)) >= rows.width:
                    found[place] = length
                looked += 1
                if looked == PLACES:
                    break
        return found

    def common(self, context: Sequence[int], place: int) -> int:
        tokens, end = self.tokens, len(context) - 1
        length, most = 0, min(MATCH, end + 1, place + 1)
        while length + STRIDE <= most:
            mine, theirs = place - length, end - length
            if tokens[mine + 1 - STRIDE : mine + 1] != context[theirs + 1 - STRIDE : theirs + 1]:
                break
            length += STRIDE
        while length < most and tokens[place - length] == context[end - length]:
            length += 1
        return length

    def following(self, place: int, most: int) -> list[int]:
        """At most so many tokens from this place on, to the end of its text."""
        found = self.tokens[place : place + most]
        return found[: found.index(BETWEEN)] if BETWEEN in found else found

    def vote(self, places: list[int], match: int, most: int) -> Draft | None:
        """What most of the places go on with, token by token; of equally many the latest."""
        tokens, count, size = self.tokens, len(places), len(self.tokens)
        places = sorted(places, reverse=True)
        live, chosen, probs = places, list[int](), list[float]()
        kinds, entropy = 0, 0.0
        for ahead in range(1, most + 1):
            if len(live) == 1 and ahead > 1:
                rest = self.following(live[0] + ahead, most + 1 - ahead) if 1 / count >= LEAST else []
                chosen, probs = chosen + rest, probs + [1 / count] * len(rest)
                break
            votes = Counter(tokens[place + ahead] for place in live if place + ahead < size)
            votes.pop(BETWEEN, None)
            if ahead == 1:
                kinds, entropy = len(votes), entropy_of(votes)
            if not votes:
                break
            token, support = max(votes.items(), key=lambda pair: pair[1])  # the first of equals, so the latest
            if support / count < LEAST:
                break
            chosen.append(token)
            probs.append(support / count)
            live = [place for place in live if place + ahead < size and tokens[place + ahead] == token]
        if not chosen:
            return None
        return Draft(
            tokens=tuple(chosen), probs=tuple(probs), match=match, places=count, kinds=kinds, entropy=entropy,
            age=size - 1 - places[0],
        )  # fmt: skip


def entropy_of(counts: Counter[int]) -> float:
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())
