"""Whether two answers are worth the same.

Numbers are compared exactly, however they are written: 1,000, 1/2, \\frac12, 0.5, 50\\%. What is more than a number
is asked of `math-verify`, where it is installed, in a process of its own, as its time limits are signals; else it has
to be written alike.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from multiprocessing import get_context

SECONDS = 20.0  # for one comparison; math-verify stops itself after five for each of its parts
LONGEST = 500  # characters of an answer that is looked at
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(-?\d+)\}|(\d))")
WORD, ARTICLES = re.compile(r"[\w+*/^=<>%-]+"), ("a", "an", "the")
DRESS = re.compile(r"\\(?:left|right|,|!|;|text\{[^{}]*\}|mathrm\{[^{}]*\}|displaystyle)|[$\s]|\.$")


def same_value(said: str, truth: str) -> bool:
    """Both as written inside a box."""
    one, other = plain(said), plain(truth)
    if one == other:
        return True
    numbers = number(one), number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if len(said) > LONGEST or importlib.util.find_spec("math_verify") is None:
        return False
    return in_time(said, truth)


def same_words(said: str, truth: str) -> bool:
    """Answers in words: numbers by their value, else word for word, whatever the case, articles and punctuation. What
    is reckoned with (`same_value`) takes words for products of letters, of which "listen" and "silent" are the same."""
    numbers = number(plain(said)), number(plain(truth))
    if None not in numbers:
        return numbers[0] == numbers[1]
    one, other = ([word for word in WORD.findall(text.casefold()) if word not in ARTICLES] for text in (said, truth))
    return bool(one) and one == other


def plain(text: str) -> str:
    """Without what changes how it looks and not what it says."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", DRESS.sub("", text)).removesuffix(".")


def number(text: str) -> Fraction | None:
    share = text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\")
    if found := FRACTION.fullmatch(text):
        sign, *parts = found.groups()
        above, below = (int(part) for part in parts if part is not None)
        text = f"{-above if sign else above}/{below}"
    try:
        value = Fraction(text) if len(text) <= LONGEST and not re.search("[eE_]", text) else None
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if share and value is not None else value


# ----- in a process of its own ----------------------------------------------------------------------------------------


@functools.cache
def worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def in_time(said: str, truth: str) -> bool:
    """What takes too long is not the same."""
    try:
        return worker().submit(symbolic, said, truth).result(SECONDS)
    except (TooLong, BrokenProcessPool):
        for process in [*worker()._processes.values()]:
            process.kill()
        worker.cache_clear()
        return False


def symbolic(said: str, truth: str) -> bool:
    from math_verify import parse, verify

    one, other = (parse(f"\\boxed{{{text}}}") for text in (truth, said))
    return bool(one and other and verify(one, other))
