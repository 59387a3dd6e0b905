"""Text that training must not see: which documents share a stretch with an evaluation set.

Two measures. A run of `words` words, equal after case, numbers, accents and punctuation are set aside: the library's
own n-gram filter does that. A run of `width` bytes, equal after case and white space are set aside: for code, and for
languages that put no spaces between words. Its windows are found by their hashes

    h(i) = sum over j < width of (b[i + j] + 1) * BASE**j    modulo 2**64

which cumulative sums give for all i at once, since BASE is odd and so has an inverse.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import numpy as np

BASE = 0x9E3779B97F4A7C15
PIECE = 1 << 18  # windows at a time: their hashes stay in the cache
SIEVE = 24  # bits of a hash that are looked up before the hash itself is sought
SPREAD = np.uint64(0xBF58476D1CE4E5B9)  # odd; brings all bits of a hash to its top


def plain(text: str) -> str:
    """Lower case, white space as single spaces."""
    return re.sub(r"\s+", " ", text.lower()).strip()


@functools.cache
def powers(base: int, count: int) -> np.ndarray:
    """base**j modulo 2**64 for j < count."""
    steps = np.full(count, base, np.uint64)
    steps[0] = 1
    return np.multiply.accumulate(steps)


def window_hashes(raw: bytes, width: int) -> np.ndarray:
    """h(i) of every window of the bytes; none where they are fewer than `width`. At most PIECE windows."""
    data = np.frombuffer(raw, np.uint8).astype(np.uint64) + np.uint64(1)
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(data * powers(BASE, PIECE + width)[: len(data)], out=sums[1:])
    inside = sums[width:] - sums[:-width]
    return inside * powers(pow(BASE, -1, 1 << 64), PIECE)[: len(inside)] * SPREAD


class Windows:
    """Byte windows of many texts, with the number of the set that each came from; later sets do not take over."""

    def __init__(self, sets: Iterable[Iterable[str]], width: int):
        self.width = width
        hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        for number, texts in enumerate(sets):
            for text in texts:
                for part in self.parts(text):
                    hashes.append(window_hashes(part, width))
                    owners.append(np.full(len(hashes[-1]), number, np.int32))
        self.hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self.owners = np.concatenate(owners)[first]
        self.sieve = np.zeros(1 << SIEVE, bool)
        self.sieve[self.hashes >> np.uint64(64 - SIEVE)] = True

    def parts(self, text: str) -> Iterable[bytes]:
        """The plain text in pieces that together have each window once."""
        raw = plain(text).encode()
        for start in range(0, len(raw) - self.width + 1, PIECE):
            yield raw[start : start + PIECE + self.width - 1]

    def find(self, text: str) -> tuple[int, str] | None:
        """(number of the set, the shared bytes) of the first window that is known."""
        for part in self.parts(text):
            hashes = window_hashes(part, self.width)
            maybe = np.flatnonzero(self.sieve[hashes >> np.uint64(64 - SIEVE)])
            places = np.searchsorted(self.hashes, hashes[maybe])
            known = np.flatnonzero(self.hashes[np.minimum(places, len(self.hashes) - 1)] == hashes[maybe])
            if len(known):
                at = maybe[known[0]]
                return int(self.owners[places[known[0]]]), part[at : at + self.width].decode("utf-8", "replace")
        return None
