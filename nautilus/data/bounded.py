"""A jinja2 sandbox in which no template takes long or makes much, whatever it says.

Work is counted while a template is rendered: one for a turn of a loop, a call, a filter, an operation, and one more for
every 128 letters or items that these are given or make. What would be made is bounded before it is made, so that
`'a' * 10**10` or `replace` cannot fill the memory. The allowance grows with what the template is given.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

WORK = 1_000_000  # and as much again as there are letters in the messages
LONGEST = 1 << 22  # letters or items of anything, and the letters of the messages
DIGITS = 10_000  # bits of a number
PER_LETTER = 128
# Widths of five digits, or given beside, in patterns of % and of format.
WIDTH = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{5}|\*)|\{[^{}]*(?::[^{}]*\d{5}|\{)")
HOLDING = (list, tuple, dict, set, frozenset)
SIZED = (str, bytes, range, *HOLDING)
# Filters that take items as they are; any other may compare them or write them as text, with all that is in them.
OF_ITEMS = frozenset("attr batch count d default first items last length list map random reverse slice".split())
# Methods and filters that may make as many letters or items as a number given to them says.
FILLING = frozenset("batch center expandtabs indent ljust range rjust round safe_range slice tojson zfill".split())
SQUARE = frozenset(["striptags", "urlize", "wordwrap"])  # whose time may grow with the square of the text
COMPARING = frozenset("== != < <= > >= eq ne lt le gt ge equalto greaterthan lessthan in sameas".split())


class TooMuch(Exception):
    """What a template would do is more than any conversation needs."""


class Meter:
    def __init__(self, given: object):
        self.left = self.longest = 1 << 62
        size = self.told(given)
        self.left, self.longest = WORK + size, LONGEST + size

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise TooMuch("its loops and operations take too much work")

    def refuse_longer(self, size: int, times: int = 1) -> None:
        if size > self.longest * times:
            raise TooMuch(f"it makes a text, a list or a number of {size:,}")

    def weigh(self, value: Any) -> Any:
        """Counts a value by its own length, and gives it."""
        size = len(value) if isinstance(value, SIZED) else 0
        self.left -= 1 + size // PER_LETTER
        if self.left < 0 or size > self.longest:
            self.refuse_longer(size)
            self.spend(0)
        return value

    def made(self, value: Any) -> Any:
        """Counts what was made; a list takes as much memory as eight times as many letters."""
        self.spend(length(value) // 16 if isinstance(value, HOLDING) else 0)
        return self.weigh(value)

    def told(self, value: Any) -> int:
        """The letters of a value with all that is in it, counted."""
        if not isinstance(value, HOLDING):
            self.weigh(value)
            return length(value) + 8
        size, waiting = 0, [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                size += len(one)
            elif isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, HOLDING):
                waiting += one
            size += 8
            self.spend(1)
            self.refuse_longer(size + 8 * len(waiting))
        self.spend(size // PER_LETTER)
        return size

    def before(self, name: str, subject: Any, given: Sequence) -> None:
        """Refuses what a call or filter would make: of its subject, its numbers, and the texts that it puts in."""
        self.weigh(subject)
        for value in given:
            self.told(value) if isinstance(value, tuple) else self.weigh(value)
        size = length(subject) if name in OF_ITEMS or isinstance(subject, str) else self.told(subject)
        texts = [value for value in given if isinstance(value, str)]
        if name == "replace" and len(texts) > 1:
            self.refuse_longer(size + str(subject).count(texts[0]) * len(texts[1]))
        elif name == "join":
            between = length(subject) if isinstance(subject, str) else max(map(len, texts), default=0)
            items = [value for value in (subject, *given) if not isinstance(value, str)]
            self.refuse_longer(sum(self.told(value) + between * length(value) for value in items))
        elif name in ("format", "format_map"):
            self.refuse_widths(subject, given)
        elif name in SQUARE:
            self.refuse_longer(size * size, times=64)
        elif name in FILLING:
            most = max((abs(value) for value in given if isinstance(value, int)), default=0)
            self.refuse_longer((1 + size) * (1 + most) if most else 0, times=64)

    def refuse_widths(self, pattern: Any, given: Any) -> None:
        """Of what is written by a pattern."""
        self.told(given)
        if WIDTH.search(str(pattern)):
            raise TooMuch("it writes a number in more places than can be read")


def length(value: Any) -> int:
    return len(value) if isinstance(value, SIZED) else 0


METER: ContextVar[Meter] = ContextVar("METER")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **named):
        super().__init__(optimized=False, **named)  # constants are computed when they are counted, not before
        self.filters = {name: metered(name, function) for name, function in self.filters.items()} | COUNTED
        self.tests |= {name: comparing(function) for name, function in self.tests.items() if name in COMPARING}
        self.globals.pop("lipsum")

    def _parse(self, *given) -> jinja2.nodes.Template:
        return Counting().visit(super()._parse(*given))

    def is_safe_attribute(self, obj, attr, value) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (
            isinstance(obj, str) and attr in ("translate", "encode")
        )

    def call(__self, __context, __obj, *args, **named):  # noqa: B902, N805
        # A method format comes wrapped.
        owner, meter = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None), METER.get()
        name, given = getattr(__obj, "__name__", ""), [*args, *named.values()]
        if isinstance(owner, (list, tuple)):
            name = "comparing"  # all that their methods do; count is also a filter
        meter.before(name, owner if isinstance(owner, (str, list, tuple)) else None, given)
        return meter.made(super().call(__context, __obj, *args, **named))

    def getitem(self, obj, argument):
        if isinstance(argument, tuple):
            METER.get().told(argument)
        return METER.get().weigh(super().getitem(obj, argument))

    def call_binop(self, context, operator, left, right):
        meter = METER.get()
        meter.weigh(left)
        meter.weigh(right)
        if operator == "%" and isinstance(left, (str, bytes)):
            meter.refuse_widths(left, right)
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if length(many) and isinstance(times, int):
                    meter.refuse_longer(length(many) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > DIGITS:
                raise TooMuch(f"it makes a number of {bits:,} bits")
        return meter.made(super().call_binop(context, operator, left, right))


def weighed(value):
    return METER.get().weigh(value)


def told(value):
    METER.get().told(value)
    return value


def each(items, literal: int):
    """What a loop goes through, counted with the letters that a turn may write."""
    meter = METER.get()
    if not hasattr(items, "__len__"):
        items = list(itertools.islice(items, meter.left + 1))
    meter.spend(len(items) * (1 + literal // 256))
    return items


# As filters, under names that no template can write.
COUNTED: dict[str, Callable] = {"to weigh": weighed, "to tell": told, "to go through": each}


def metered(name: str, function: Callable) -> Callable:
    """The filter, counted."""
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def counted(*args, **named):
        meter = METER.get()
        meter.before(name, args[first], [*args[first + 1 :], *named.values()])
        return meter.made(function(*args, **named))

    return counted


def comparing(function: Callable) -> Callable:
    """The test, with what it compares counted."""
    return lambda *values: function(*map(told, values))


class Counting(jinja2.visitor.NodeTransformer):
    """Puts the counting into a template that was read."""

    def visit_For(self, node):
        self.generic_visit(node)
        literal = sum(len(text.data) for text in node.find_all(jinja2.nodes.TemplateData))
        node.iter = asked("to go through", node.iter, jinja2.nodes.Const(literal))
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        node.nodes = [told_of(part) for part in node.nodes]
        return asked("to weigh", node)

    def visit_Compare(self, node):
        self.generic_visit(node)
        node.expr = told_of(node.expr)
        for operand in node.ops:
            operand.expr = told_of(operand.expr)
        return node

    def visit_Pair(self, node):
        self.generic_visit(node)
        node.key = told_of(node.key)
        return node

    def visit_Output(self, node):
        self.generic_visit(node)
        node.nodes = [told_of(part) for part in node.nodes]
        return node


def told_of(value: jinja2.nodes.Expr) -> jinja2.nodes.Expr:
    constant = isinstance(value, (jinja2.nodes.Const, jinja2.nodes.TemplateData))
    return value if constant else asked("to tell", value)


def asked(name: str, value: jinja2.nodes.Expr, *given: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(value, name, list(given), [], None, None)


def rendered(template: jinja2.Template, variables: dict) -> str:
    """The template's text; TooMuch where the work or the text is more than is allowed."""
    before = METER.set(Meter(variables))
    try:
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            METER.get().refuse_longer(size)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        METER.reset(before)
