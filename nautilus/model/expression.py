"""Regular expressions of unknown origin, matched in time that grows no faster than the text.

Python's own matcher tries one way after another, and of `(a|ab)*c` there are exponentially many. Here all ways are
followed at once (Thompson, CACM 1968): an expression becomes instructions, and what is known after each letter of a
text is the set of those that may come next. Sets that came up before are remembered, with what each letter makes of
them. Left out are backreferences, flags, word boundaries, and looking around other than ahead from the very beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

INSTRUCTIONS = 1000  # of an expression; what is repeated so many times is written out
SETS = 1000  # that are remembered
TOKEN = re.compile(r"\(\?:|\(\?P<\w+>|\(\?[=!]|\(\?|\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|\{(?=[\d,])\d*,?\d*\}|.", re.DOTALL)
EDGES = {"^": "start", r"\A": "start", "$": "end", r"\Z": "end"}
COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(eq=False)
class Instruction:
    """kind: letter (one that `accepts` matches), fork, start and end (of the text), done. then: what may follow."""

    kind: str
    then: list[Instruction] = field(default_factory=list)
    accepts: Callable[[str], object] = bool


DONE = Instruction("done")
Part = Callable[[Instruction], Instruction]  # of what follows it makes what begins with it


class Expression:
    """`match` as of `re.compile(pattern)`, but a bool. re.error for what is no expression or is left out here."""

    def __init__(self, pattern: str):
        re.compile(pattern)  # for its words on what is no expression
        self.tokens, self.size, self.ahead = TOKEN.findall(pattern)[::-1], 0, []
        self.take("^")
        while opening := self.take("(?=", "(?!"):
            self.ahead.append((opening == "(?=", Sets(self.either()(DONE))))
            self.take(")")
        branches = self.branches()
        if self.ahead and len(branches) > 1:
            raise re.error("it looks ahead in one of several alternatives")
        self.sets = Sets(self.any_of(branches)(DONE))

    def match(self, text: str) -> bool:
        return all(sets.match(text) == wanted for wanted, sets in self.ahead) and self.sets.match(text)

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, else nothing."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def new(self, kind: str, then: list[Instruction], accepts: Callable[[str], object] = bool) -> Instruction:
        self.grow()
        return Instruction(kind, then, accepts)

    def grow(self) -> None:
        self.size += 1
        if self.size > INSTRUCTIONS:
            raise re.error(f"it takes more than {INSTRUCTIONS} instructions")

    def either(self) -> Part:
        return self.any_of(self.branches())

    def any_of(self, branches: list[Part]) -> Part:
        if len(branches) == 1:
            return branches[0]
        return lambda after: self.new("fork", [branch(after) for branch in branches])

    def branches(self) -> list[Part]:
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        return found

    def sequence(self) -> Part:
        parts: list[Part] = []
        while self.tokens and self.tokens[-1] not in ("|", ")"):
            parts.append(self.repeated(self.one(self.tokens.pop())))

        def part(after: Instruction) -> Instruction:
            for each in reversed(parts):
                after = each(after)
            return after

        return part

    def one(self, token: str) -> Part:
        if token in ("(", "(?:") or token.startswith("(?P<"):
            inside = self.either()
            self.take(")")
            return inside
        if token in EDGES:
            return lambda after: self.new(EDGES[token], [after])
        if token.startswith("(?") or re.fullmatch(r"\\[1-9bB]", token):
            raise re.error(f"{token} is not understood here")
        accepts = re.compile(token).match
        return lambda after: self.new("letter", [after], accepts)

    def repeated(self, part: Part) -> Part:
        token = self.tokens[-1] if self.tokens else ""
        if token not in COUNTS and not (token.startswith("{") and len(token) > 1):
            return part
        self.tokens.pop()
        if self.take("+"):
            raise re.error(f"{token}+ is not understood here")
        self.take("?")  # fewer first: no other texts
        low, comma, high = token[1:-1].partition(",")
        counted = (int(low or 0), int(high) if high else None if comma else int(low)) if token not in COUNTS else None
        least, most = counted or COUNTS[token]
        return lambda after: self.times(part, least, most, after)

    def times(self, part: Part, least: int, most: int | None, after: Instruction) -> Instruction:
        begin = after
        if most is None:
            begin = self.new("fork", [after])
            begin.then.append(part(begin))
        for _ in range((most or least) - least):
            begin = self.new("fork", [after, part(begin)])
        for _ in range(least):
            self.grow()  # a part may be nothing
            begin = part(begin)
        return begin


class Sets:
    """The sets of instructions that may come next, from the first one on."""

    def __init__(self, first: Instruction):
        self.known: dict[frozenset[Instruction], Set] = {}
        self.first = self.reached([first], begins=True)

    def reached(self, places: Iterable[Instruction], *, begins: bool = False) -> Set:
        after = frozenset(reach(places, {"fork", "start"} if begins else {"fork"}))
        if len(self.known) < SETS:
            return self.known.setdefault(after, Set(self, after))
        return self.known.get(after) or Set(self, after)

    def match(self, text: str) -> bool:
        now = self.first
        for letter in text:
            if now.done or not now.places:
                return now.done
            now = now[letter]
        return now.done or DONE in reach(now.places, {"fork", "end"} if text else {"fork", "start", "end"})


class Set(dict[str, "Set"]):
    """What follows by letter."""

    def __init__(self, sets: Sets, places: frozenset[Instruction]):
        self.sets, self.places, self.done = sets, places, DONE in places

    def __missing__(self, letter: str) -> Set:
        accepting = (place for place in self.places if place.kind == "letter" and place.accepts(letter))
        following = self.sets.reached(then for place in accepting for then in place.then)
        if len(self.sets.known) < SETS:
            self[letter] = following
        return following


def reach(places: Iterable[Instruction], through: set[str]) -> set[Instruction]:
    """These and all that follow without a letter, by way of such kinds."""
    found, waiting = set(), list(places)
    while waiting:
        if (place := waiting.pop()) not in found:
            found.add(place)
            waiting += place.then if place.kind in through else ()
    return found
