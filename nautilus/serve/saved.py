"""Saved states by the prefix they follow: what of a new prompt need not be computed again.

An Entry is what a model had in mind after some tokens: a copy of its recurrent states, and references to the pages that
hold the keys and values of these tokens. Entries stand in a tree of prefixes. Memory is bounded: what is worth least
goes, to a file if there is a folder (`spill.py`), from where it comes back when it is found.

    saved = Saved(pool, budget=4 << 30, folder=Folder("cache", model=hash, numerics="1 fp32 bf16", limit=50 << 30))
    found = saved.find(tenant, tokens, len(tokens) - 1)       locked from here on
    ... hold found.entry.pages, copy found.entry.state into a slot, go on after found.length tokens ...
    saved.unlock(found.entry)
    saved.keep(tenant, tokens, pages, state, seconds)

All of it belongs to one thread, the engine's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from nautilus.serve.events import KvEvents
from nautilus.serve.prefix import Match, PrefixTree, Tokens, as_tokens
from nautilus.serve.spill import BadFile, Folder, file_bytes, keyed_digest
from nautilus.serve.worth import ALPHA, MIB, Entry, worth

log = logging.getLogger("nautilus.serve")
# To write an entry and read it back, checksums included: 0.3 and 0.2 s were measured for 105 MiB. What saves less is
# not written, nor read.
DISK_SECONDS_PER_MIB = 0.005


class PagePool(Protocol):
    """What is asked of the pool of pages; every page has a count of references, and is free when there is none."""

    page_bytes: int  # of a page, in all layers together

    def free(self) -> int: ...  # how many pages are
    def take(self, count: int) -> list[int]: ...  # free pages, with one reference each; only asked if there are so many
    def hold(self, pages: Sequence[int]) -> None: ...  # one more reference to each
    def release(self, pages: Sequence[int]) -> None: ...  # one less
    def read(self, pages: Sequence[int]) -> list[Tensor]: ...  # what is in them: the first axis of each is these pages
    def write(self, pages: Sequence[int], tensors: Sequence[Tensor]) -> None: ...


class Found(NamedTuple):
    entry: Entry | None  # locked
    length: int  # of the tokens, so many need not be computed
    common: int  # of the tokens, so many were seen before: if that is far beyond `length`, save a state there


@dataclass(kw_only=True)
class Counts:
    """What happened so far; `bytes`: of states and tokens in memory now."""

    queries: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_found: int = 0
    evictions: int = 0
    spilled: int = 0
    restored: int = 0
    bytes: int = 0


class Saved:
    """The store.

    pool: whose pages the entries hold.
    budget: bytes that states and tokens in memory may take. Pages are the pool's to bound; see `make_room`.
    everywhere: for models without recurrent states, whose keys and values serve at every length: an entry is then found
        by any prompt that begins as it does, and takes the place of the shorter ones that it continues.
    alpha: how much the seconds that an entry saves count against its age; see `worth`.
    folder: where entries go that memory has no room for, and come back from, also after a restart.
    """

    def __init__(
        self, pool: PagePool, *, budget: int, everywhere: bool = False, alpha: float = ALPHA,
        folder: Folder | None = None,
    ):  # fmt: skip
        self.pool, self.budget, self.everywhere, self.alpha, self.folder = pool, budget, everywhere, alpha, folder
        self.tree, self.counts, self.uses = PrefixTree[Entry](), Counts(), 0
        self.events: KvEvents | None = None
        self.key = folder.key if folder else os.urandom(32)
        for head in folder.index() if folder else ():
            size = head.bytes + head.tokens_T.nbytes
            entry = Entry(seconds=head.seconds, bytes=size, count=head.pages, file=head.name)
            self.use(self.plant(head.space, head.tokens_T, entry))
        self.make_disk(0)

    def space(self, name: str) -> str:
        """The tree and the files know namespaces by a keyed hash."""
        return keyed_digest(self.key, "space", name.encode("utf-8", "surrogatepass"))

    def tell(self, events: KvEvents) -> None:
        """From now on, of every entry that comes or goes; at once of those that are there."""
        self.events = events
        for place in self.tree:
            events.stored(place.space, place.tokens())

    def entries(self) -> Iterator[Entry]:
        return (place.entry for place in self.tree if place.entry is not None)

    # ----- what an engine asks ---------------------------------------------------------------------------------------

    def find(self, space: str, tokens: Tokens, most: int) -> Found:
        """The entry that saves most of these tokens, but no more than `most` of them: one at least must be computed,
        for its logits. It is exempt from eviction until `unlock`. It may have to be read from its file first.

        Where `length` ends inside a page, that page is to be copied before a token is added to it: it has other owners.
        """
        tokens_T, space = as_tokens(tokens), self.space(space)
        match = self.tree.find(space, tokens_T, most)
        entry, length = self.usable(match, space, tokens_T, most)
        self.counts.queries += 1
        self.counts.tokens_asked += len(tokens_T)
        if entry is not None:
            self.use(entry)
            entry.locks += 1
            self.counts.hits += 1
            self.counts.tokens_found += length
        return Found(entry, length, match.common)

    def unlock(self, entry: Entry) -> None:
        if not entry.locks:
            raise ValueError(f"an entry of {entry.length} tokens was unlocked but is not locked; unlock each find once")
        entry.locks -= 1

    def keep(self, space: str, tokens: Tokens, pages: Sequence[int], state: Sequence[Tensor], seconds: float) -> bool:
        """Save what is known after these tokens; False if there is no room for it. What is there already stays.

        pages: that hold the tokens' keys and values; each gets one more reference. Who gives them may go on filling the
            last one, behind these tokens.
        state: copies that nobody will change. seconds: what the prefill of all these tokens takes.
        """
        tokens_T, space = as_tokens(tokens), self.space(space)
        if (known := self.covering(space, tokens_T)) is not None:
            self.use(known)
            return True
        size = tokens_T.nbytes + sum(tensor.nbytes for tensor in state)
        if not self.make_bytes(size):
            return False
        entry = self.tree.find(space, tokens_T).entry  # in a file, unless that had to make room too
        if entry is None or entry.length < len(tokens_T):
            entry = self.plant(space, tokens_T, Entry(seconds=seconds, bytes=size, count=len(pages)))
        self.pool.hold(pages)
        self.fill(entry, pages, state)
        self.use(entry)
        while self.everywhere and (shorter := entry.shorter) is not None and not shorter.locks:
            self.forget(shorter)
        return True

    def make_room(self, pages: int) -> bool:
        """Evict until so many pages of the pool are free; False if that cannot be."""
        if self.pool.free() < pages:
            mine = {page for entry in self.evictable() for page in entry.pages}
            if self.pool.free() + len(mine) < pages:  # so that a vain wish costs nothing
                return False
        while self.pool.free() < pages:
            if not self.evict():
                return False
        return True

    def spill(self) -> bool:
        """For idle time: write that entry to a file which saves most seconds and has none. False if none can be."""
        waiting = sorted((entry for entry in self.entries() if not entry.file), key=lambda entry: -entry.seconds)
        return any(self.write(entry) for entry in waiting)

    def clear(self) -> None:
        """Forget all, files too: after a change of the weights. ValueError while an entry is locked."""
        entries = list(self.entries())
        if locked := sum(entry.locks > 0 for entry in entries):
            raise ValueError(f"all saved states were to be forgotten while {locked} are in use; unlock them before")
        if self.events:
            self.events.cleared()
        for entry in entries:
            self.forget(entry)

    # ----- what is found ---------------------------------------------------------------------------------------------

    def usable(self, match: Match[Entry], space: str, tokens_T: np.ndarray, most: int) -> tuple[Entry | None, int]:
        """The first that is in memory or comes back from its file, and how many tokens it saves."""
        beyond, reach = match.beyond, min(match.common, most)
        if self.everywhere and beyond is not None and reach > 0:
            # A file is read as a whole: not for a small part of it.
            if (beyond.here or 2 * reach > beyond.length) and self.ready(beyond):
                return beyond, reach
        while match.entry is not None:
            if self.ready(match.entry):
                return match.entry, match.length
            match = self.tree.find(space, tokens_T, match.length - 1)
        return None, 0

    def covering(self, space: str, tokens_T: np.ndarray) -> Entry | None:
        """One in memory that serves after all of these tokens."""
        match = self.tree.find(space, tokens_T)
        exact = match.entry if match.length == len(tokens_T) else None
        wider = match.beyond if self.everywhere and match.common == len(tokens_T) else None
        return next((entry for entry in (exact, wider) if entry is not None and entry.here), None)

    def use(self, entry: Entry) -> None:
        self.uses += 1
        entry.used = self.uses
        if self.folder and entry.file and entry.here:
            self.folder.touch(entry.file)

    # ----- room ------------------------------------------------------------------------------------------------------

    def evictable(self) -> Iterator[Entry]:
        return (entry for entry in self.entries() if entry.here and not entry.locks)

    def evict(self) -> bool:
        """Take what is worth least out of memory, into a file if that pays. False if nothing may go."""
        entries = list(self.evictable())
        if not entries:
            return False
        scores = worth(entries, alpha=self.alpha, page_bytes=self.pool.page_bytes)
        _, least = min(zip(scores, range(len(entries)), strict=True))
        self.write(entries[least])
        self.empty(entries[least])
        self.counts.evictions += 1
        return True

    def make_bytes(self, size: int) -> bool:
        """Evict until so many bytes of the budget are free; False, and nothing evicted, if that cannot be."""
        if self.counts.bytes - sum(entry.bytes for entry in self.evictable()) + size > self.budget:
            return False
        while self.counts.bytes + size > self.budget:
            self.evict()
        return True

    def make_disk(self, size: int, before: int | None = None) -> bool:
        """Remove files until there is room for so many bytes: those unused the longest, used before that time."""
        assert self.folder is not None or not size
        if self.folder is None:
            return True
        excess = self.folder.bytes + size - self.folder.limit
        old = [entry for entry in self.entries() if entry.file and not entry.locks]
        old = sorted((entry for entry in old if before is None or entry.used < before), key=lambda entry: entry.used)
        if excess > sum(self.folder.sizes[entry.file] for entry in old if entry.file):
            return False
        for entry in old:
            if self.folder.bytes + size <= self.folder.limit:
                break
            self.unfile(entry)
        return True

    # ----- entries come and go ---------------------------------------------------------------------------------------

    def plant(self, space: str, tokens_T: np.ndarray, entry: Entry) -> Entry:
        entry.place = self.tree.put(space, tokens_T, entry)
        if self.events:
            self.events.stored(space, tokens_T)
        return entry

    def uproot(self, entry: Entry) -> None:
        if self.events:
            self.events.removed(entry.place.space, entry.place.tokens())
        self.tree.drop(entry.place)

    def fill(self, entry: Entry, pages: Sequence[int], state: Sequence[Tensor]) -> None:
        entry.here, entry.pages, entry.state = True, list(pages), list(state)
        self.counts.bytes += entry.bytes

    def empty(self, entry: Entry) -> None:
        """Out of memory; out of the tree too, unless there is a file."""
        self.pool.release(entry.pages)
        entry.here, entry.pages, entry.state = False, [], []
        self.counts.bytes -= entry.bytes
        if not entry.file:
            self.uproot(entry)

    def unfile(self, entry: Entry) -> None:
        """No more in a file; out of the tree too, unless it is in memory."""
        assert self.folder is not None and entry.file is not None
        self.folder.remove(entry.file)
        entry.file = None
        if not entry.here:
            self.uproot(entry)

    def forget(self, entry: Entry) -> None:
        file = entry.file
        if entry.here:
            self.empty(entry)
        if file:
            self.unfile(entry)

    def write(self, entry: Entry) -> bool:
        """Put what is in memory into a file as well, if that pays and the folder has room or older files."""
        folder, size = self.folder, file_bytes(entry.length, *entry.state) + entry.count * self.pool.page_bytes
        if folder is None or folder.broken or entry.file or entry.seconds < DISK_SECONDS_PER_MIB * size / MIB:
            return False
        if not self.make_disk(size, before=entry.used):
            return False
        with folder.quietly():
            entry.file = folder.write(
                entry.place.space,
                entry.place.tokens(),
                seconds=entry.seconds,
                state=entry.state,
                pages=self.pool.read(entry.pages),
                count=entry.count,
            )
        self.counts.spilled += entry.file is not None
        return entry.file is not None

    def ready(self, entry: Entry) -> bool:
        """Whether it is in memory; brought there from its file if that pays and there is room. One with a bad file is
        forgotten."""
        if entry.here or self.folder is None or entry.file is None:
            return entry.here
        if self.seconds_beyond(entry) < DISK_SECONDS_PER_MIB * self.folder.sizes[entry.file] / MIB:
            return False
        entry.locks += 1  # nobody makes room by removing this file
        try:
            return self.make_room(entry.count) and self.make_bytes(entry.bytes) and self.restore(entry, entry.file)
        except BadFile as bad:
            self.folder.refuse(entry.file, bad)
            self.unfile(entry)
        except (MemoryError, RuntimeError) as bad:  # the latter is torch's for no memory
            log.warning("the state after %d tokens stays in its file (%s)", entry.length, bad)
        finally:
            entry.locks -= 1
        return False

    def restore(self, entry: Entry, file: str) -> bool:
        """Into memory, where there is room for it. BadFile where the file is not to be believed."""
        assert self.folder is not None
        state, contents = self.folder.read(file)
        layout = [(tensor.dtype, (entry.count, *tensor.shape[1:])) for tensor in self.pool.read([])]
        if layout != [(tensor.dtype, tuple(tensor.shape)) for tensor in contents]:
            raise BadFile("pages are laid out in another way here")
        pages = self.pool.take(entry.count)
        try:
            self.pool.write(pages, contents)
        except BaseException:
            self.pool.release(pages)
            raise
        self.fill(entry, pages, state)
        self.counts.restored += 1
        return True

    def seconds_beyond(self, entry: Entry) -> float:
        """What it saves beyond the next shorter one in memory."""
        shorter = entry.shorter
        while shorter is not None and not shorter.here:
            shorter = shorter.shorter
        return entry.seconds - (shorter.seconds if shorter else 0)
