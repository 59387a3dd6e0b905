"""Requests that begin with what is known already go on from there.

What a request has read is kept after its marks, where another one parted from it, and at its end. A kept prefix is a
copy of the recurrent states, and references to the pages of its keys and values, which nobody copies: see `saved.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Set
from pathlib import Path

import torch
from torch import Tensor

from nautilus.config import to_dict
from nautilus.model.lanes import MambaSlots, RestingSlots
from nautilus.model.language import Language
from nautilus.ops.cpu.library import INTERFACE, native
from nautilus.ops.formats import Packed
from nautilus.ops.pages import PAGE
from nautilus.runtime import UserError
from nautilus.serve.events import KvEvents
from nautilus.serve.memory import Berth, Berths
from nautilus.serve.request import Request
from nautilus.serve.saved import Saved
from nautilus.serve.scheduler import Scheduler
from nautilus.serve.spill import Folder
from nautilus.serve.worth import Entry

log = logging.getLogger("nautilus.serve")
BRANCH = 256  # tokens that two prompts must share beyond what is kept for that to be worth a state
LEAST = 16  # tokens; less is read sooner than it is found
SAMPLE = 1024  # numbers of a tensor that are looked at
UNMEASURED = 1e-3  # seconds per token, before any prompt was read


class Prefixes:
    """Room for requests, with what is known of their prompts in it."""

    def __init__(
        self, berths: Berths, scheduler: Scheduler, model: Language, gigabytes: float, folder: Path | None,
        folder_gigabytes: float,
    ):  # fmt: skip
        self.berths, self.scheduler, self.model, self.saved = berths, scheduler, model, None
        stateful = [layer for layer in berths.layers if isinstance(layer, MambaSlots | RestingSlots)]
        self.rounded = any(isinstance(layer, RestingSlots) for layer in stateful)
        if gigabytes:
            files = None
            if folder is not None:
                files = Folder(
                    folder, model=fingerprint(model), numerics=numerics(berths), limit=int(folder_gigabytes * 1e9)
                )
            self.saved = Saved(berths.pool, budget=int(gigabytes * 1e9), everywhere=not stateful, folder=files)

    def board(self, request: Request) -> Berth | None:
        """A berth that holds as much of the request's tokens as is known; None until there is room for it."""
        if self.saved is None:
            request.marks = ()  # nothing is kept after them: a prompt is not read in pieces for that
            return self.berths.take(self.room(request)) if self.fits(self.needed(request, 0)) else None
        most = 0 if request.unscored else len(request.tokens) - 1
        found = self.saved.find(request.tenant, request.tokens, most)
        try:
            whole = found.length // PAGE
            if not self.fits(self.needed(request, whole)):
                return None
            berth = self.berths.take(self.room(request), found.entry.pages[:whole] if found.entry else ())
            if berth is not None and found.entry is not None:
                self.go_on(berth, found.entry, found.length)
        finally:
            if found.entry is not None:
                self.saved.unlock(found.entry)
        if berth is not None:
            request.cached = min(found.length, request.prompt) if not request.pieces else request.cached
            if found.common >= found.length + BRANCH and not self.saved.everywhere and not request.unscored:
                request.marks = (*request.marks, found.common)
        return berth

    def go_on(self, berth: Berth, entry: Entry, length: int) -> None:
        """The berth holds the first so many tokens of what the entry knows."""
        try:
            if length % PAGE:
                self.berths.pool.copy(entry.pages[length // PAGE], berth.pages[length // PAGE])
            self.berths.put_state(berth, entry.state)
        except BaseException:
            self.berths.give_back(berth)
            raise
        berth.length = length

    def ahead(self, request: Request) -> list[tuple[str, tuple[int, ...]]]:
        """What it is about to read up to each of its marks, which will then be known."""
        berth = request.berth
        if self.saved is None or berth is None or berth.mixed or not request.reading:
            return []
        marks = [mark for mark in request.marks if mark > max(berth.length, LEAST - 1)]
        return [(request.tenant, tuple(request.tokens[:mark])) for mark in marks]

    def comes(self, request: Request, coming: Set[tuple[str, tuple[int, ...]]]) -> bool:
        """Whether another is about to read what this one would read as well."""
        if not coming or request.unscored:
            return False
        lengths = {len(tokens) for _, tokens in coming if len(tokens) < len(request.tokens)}
        return any((request.tenant, tuple(request.tokens[:length])) in coming for length in lengths)

    def room(self, request: Request) -> int:
        return self.scheduler.pages_needed(request) * PAGE

    def needed(self, request: Request, shared: int) -> int:
        """Free pages that there must be: those that run want one soon, too."""
        spare = len(self.scheduler.active) if self.scheduler.grow else 0
        return self.scheduler.pages_needed(request) - shared + spare

    def fits(self, pages: int) -> bool:
        return pages <= self.berths.pool.free() or self.make_room(pages) or not self.scheduler.active

    def make_room(self, pages: int) -> bool:
        """Forget what is worth least until so many pages are free; False where that is not enough."""
        return self.saved is not None and self.saved.make_room(pages)

    def keep(self, request: Request) -> None:
        """What the request has read so far. States that were rounded since, or that several weights had a part in, are
        those of no prompt, and are not kept."""
        berth = request.berth
        if self.saved is None or berth is None or berth.mixed or berth.length < LEAST:
            return
        if self.rounded and berth.awake is None:
            return
        seconds = berth.length * (self.scheduler.seconds_per_token or UNMEASURED)
        pages, tokens = berth.pages[: -(-berth.length // PAGE)], request.tokens[: berth.length]
        try:
            self.saved.keep(request.tenant, tokens, pages, self.berths.state(berth), seconds)
        except (MemoryError, RuntimeError) as bad:  # no memory for the copy: what is known is only not read again
            log.warning("the state after %d tokens could not be kept (%s)", len(tokens), bad)

    def spill(self) -> bool:
        """Write one of them to the folder; False where there is nothing to write, or none."""
        return self.saved is not None and self.saved.spill()

    def tell(self, events: KvEvents) -> None:
        """Of every prefix that becomes known, or no longer is. UserError where none are kept."""
        if self.saved is None:
            raise UserError("kv_events was asked for with saved_gb=0, so that no prefixes are kept; give saved_gb=2")
        self.saved.tell(events)

    def clear(self) -> None:
        """After a change of the weights."""
        if self.saved is not None:
            self.saved.clear()
            if self.saved.folder is not None:
                self.saved.folder.model = fingerprint(self.model)


def fingerprint(model: Language) -> str:
    """Of the model's form and of some of every tensor's numbers: training changes them all."""
    found = hashlib.sha256(json.dumps(to_dict(model.config), sort_keys=True, default=str).encode())
    for name, tensor in weights(model):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLE)].contiguous().cpu()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights(model: Language) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and the parts of matrices in few bits."""
    yield from model.state_dict().items()
    for name, module in model.named_modules():
        for packed in (value for value in vars(module).values() if isinstance(value, Packed)):
            parts = packed.codes, packed.scale, packed.tensor_scale, packed.zero
            yield from ((f"{name} {index}", part) for index, part in enumerate(parts) if part is not None)


def numerics(berths: Berths) -> str:
    """What else the bits of a state depend on."""
    pools = sorted({f"{pool.format} {pool.width}" for pool in berths.pools()})
    kernels = native().level if native().functions is not None else f"torch {torch.__version__}"
    return f"{INTERFACE} {kernels} {', '.join(pools)}"
