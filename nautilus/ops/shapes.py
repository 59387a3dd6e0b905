"""Shape letters in argument names, checked under test."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable


def checked(function: Callable) -> Callable:
    """With NAUTILUS_CHECK set: arguments named like x_BTD must agree on what B, T and D are. Otherwise: no change."""
    if not os.environ.get("NAUTILUS_CHECK"):
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **named):
        sizes: dict[str, tuple[str, int]] = {}
        for name, value in signature.bind(*args, **named).arguments.items():
            letters = re.search(r"_([A-Z]+)$", name)
            if letters is None or value is None:
                continue
            # A tuple stands for matrices of one shape that are not stacked.
            shape = (len(value), *value[0].shape) if isinstance(value, tuple) else tuple(value.shape)
            if len(shape) != len(letters[1]):
                raise ValueError(f"{function.__name__}: {name} has shape {shape}")
            for letter, size in zip(letters[1], shape, strict=True):
                first, expected = sizes.setdefault(letter, (name, size))
                if size != expected:
                    raise ValueError(f"{function.__name__}: {letter} is {expected} in {first} but {size} in {name}")
        return function(*args, **named)

    return wrapper
