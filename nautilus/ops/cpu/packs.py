"""Matrices laid out for the kernels: anew at every use, which costs little beside many rows, or once.

Who uses the same matrices again and again without changing them, as generation does, says so with `packed_once`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

# What says which matrix and for what use → the matrix, so that its address stays its own, and its packed form.
Packs = dict[tuple, tuple[Any, Any]]
_packs: contextvars.ContextVar[Packs | None] = contextvars.ContextVar("packs", default=None)


@contextlib.contextmanager
def packed_once(packs: Packs) -> Iterator[None]:
    """Matrices that are used inside are packed once and kept in `packs`; they must not change as long as it is used."""
    before = _packs.set(packs)
    try:
        yield
    finally:
        _packs.reset(before)


def packed_form(key: tuple, matrix: Any, pack: Callable[[bool], Any]) -> Any:
    """What `pack` makes, which it is told whether it will be kept."""
    packs = _packs.get()
    if packs is None:
        return pack(False)
    if key not in packs:
        packs[key] = matrix, pack(True)
    return packs[key][1]
