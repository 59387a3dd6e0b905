"""Arithmetic: sums, differences and products, done in the head or digit by digit, or with a calculator; derivatives.

| task | asked | right |
|--|--|--|
| `arithmetic` | one operation on numbers of `level` digits | the number alone |
| `calculator` | `level` nested operations on large numbers, with a tool | the number, after a call that gave a value |
| `derivative` | that of a polynomial of `level` terms | a formula alone that is equal, however it is written |
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Sequence

from nautilus.tasks.equal import same_value
from nautilus.tasks.task import (
    Call,
    Episode,
    GraderBroken,
    Message,
    Problem,
    Question,
    Reply,
    Task,
    Verdict,
    assistant,
    told,
    tool,
    user,
)

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NODES = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
FORMULA = re.compile(r"[\dx+*/^(). -]{1,80}")
LONGEST, LARGEST = 200, 10**60  # characters of an expression, and its largest value


def last_number(text: str) -> str | None:
    """As it is written, without the commas between thousands; None where there is none."""
    found = NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    return found[-1] if found else None


def number_is(answer: str, truth: str) -> Verdict:
    """Both are compared as numbers. GraderBroken for a truth that is none."""
    if not NUMBER.fullmatch(truth):
        raise GraderBroken(f"the problem's own truth {truth!r} is no number")
    said = last_number(answer)
    if said is None:
        return Verdict(reward=0.0, why="no number was said")
    return Verdict(
        reward=float(float(said) == float(truth) and (int_of(said) == int_of(truth))), why=f"{said}, {truth}"
    )


def int_of(number: str) -> str:
    """Its whole part, exactly, which a float of many digits is not."""
    whole = number.split(".")[0].lstrip("-").lstrip("0")
    return ("-" if number.startswith("-") and whole else "") + whole


class Arithmetic(Question):
    """Levels are digits. A worked answer carries digit by digit."""

    name, levels = "arithmetic", range(1, 7)

    def draw(self, rng: random.Random, level: int) -> Problem:
        sign = rng.choice("+-")
        low, high = 10 ** (level - 1) if level > 1 else 0, 10**level - 1
        a, b = sorted((rng.randint(low, high), rng.randint(low, high)), reverse=True)
        if sign == "+" and rng.random() < 0.5:
            a, b = b, a
        truth = str(OPERATIONS[sign](a, b))
        worked = assistant(truth, thinking=digit_by_digit(a, b, sign))
        asked = user(f"{a} {sign} {b} = ?")
        return Problem(task=self.name, level=level, messages=asked, truth=truth, worked=(worked,))

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        """The number alone: who works in the answer thinks without a budget."""
        if not NUMBER.fullmatch(said := reply.content.strip()):
            return Verdict(reward=0.0, why=f"{said[:80]!r} is no number alone")
        return number_is(said, problem.truth)


def digit_by_digit(a: int, b: int, sign: str) -> str:
    """From the right: the digits, what they give, and what is carried; b is at most a in a difference.

    47 + 85: "7+5=12 2 1; 4+8+1=13 3 1; 1"
    """
    left, right, steps, carry = str(a)[::-1], str(b)[::-1], [], 0
    for at in range(max(len(left), len(right))):
        x, y = int(left[at : at + 1] or 0), int(right[at : at + 1] or 0)
        more = f"{sign}{carry}" if carry else ""
        value = x + y + carry if sign == "+" else x - y - carry
        digit, carry = value % 10, int(value > 9 or value < 0)
        steps.append(f"{x}{sign}{y}{more}={value} {digit} {carry}")
    return "; ".join(steps)


class Derivative(Question):
    """Levels are terms. What is asked is not itself equal to the answer, and a formula has no words that ask for it
    once more, so saying the question again earns nothing."""

    name, levels = "derivative", range(1, 5)
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        powers = sorted(rng.sample(range(1, level + 3), level), reverse=True)
        terms = [(rng.choice((-1, 1)) * rng.randint(2, 19), power) for power in powers]
        truth = polynomial([(factor * power, power - 1) for factor, power in terms])
        asked = user(f"derivative of {polynomial(terms)} = ?")
        return Problem(task=self.name, level=level, messages=asked, truth=truth, worked=(assistant(truth),))

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        if not FORMULA.fullmatch(said := reply.content.strip()):
            return Verdict(reward=0.0, why=f"{said[:80]!r} is no formula of x alone")
        return Verdict(reward=float(same_value(said, problem.truth)), why=f"{said}, {problem.truth}")


def polynomial(terms: Sequence[tuple[int, int]]) -> str:
    """Of factors and powers: 3x^2 - 5x + 2."""
    written = (f"{factor}{'x' if power else ''}{f'^{power}' if power > 1 else ''}" for factor, power in terms)
    return " + ".join(written).replace("+ -", "- ")


# ----- with a calculator ----------------------------------------------------------------------------------------------


def calculate(expression: str) -> int:
    """Of +, -, * and parentheses over whole numbers; ValueError that says what else was met."""
    if len(expression) > LONGEST:
        raise ValueError(f"an expression may have {LONGEST} characters, this one has {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as bad:
        raise ValueError(f"{expression!r} is no expression") from bad
    return value_of(tree.body)


def value_of(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            found = value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            found = -value_of(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in NODES:
            found = NODES[type(op)](value_of(left), value_of(right))
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is more than +, -, * and whole numbers")
    if abs(found) > LARGEST:
        raise ValueError(f"numbers beyond {len(str(LARGEST)) - 1} digits are not calculated")
    return found


CALCULATOR = tool("calculate", "The value of an expression of whole numbers.", expression="with +, -, * and ( )")


class Calculator(Task):
    """Levels are calls that a careful solver makes. A right number earns nothing where no call gave a value: it is the
    tool that is to be learnt."""

    name, levels, turns = "calculator", range(1, 4), 6
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        value = rng.randint(100, 999)
        text, course = str(value), list[Message]()
        for number in range(level):
            sign, other = rng.choice("+-*"), rng.randint(100, 999)
            text = f"({text}) {sign} {other}" if number else f"{text} {sign} {other}"
            step, value = f"{value} {sign} {other}", OPERATIONS[sign](value, other)
            course += [assistant("", calls=[Call(name="calculate", arguments={"expression": step})]), told(str(value))]
        return Problem(
            task=self.name, level=level, messages=user(f"What is {text}?"), truth=str(value),
            worked=(*course, assistant(str(value))), tools=(CALCULATOR,),
        )  # fmt: skip

    def episode(self, problem: Problem) -> Episode:
        return Calculating(problem)


class Calculating(Episode):
    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.valid = 0  # calls that gave a value

    def answer(self, reply: Reply) -> Sequence[Message]:
        if reply.fault:
            return [told(f"error: {reply.fault}")]
        return [told(self.called(call)) for call in reply.calls]

    def called(self, call: Call) -> str:
        if call.name != "calculate" or not isinstance(call.arguments.get("expression"), str):
            return "error: call calculate with an expression"
        try:
            value = calculate(call.arguments["expression"])
        except ValueError as bad:
            return f"error: {bad}"
        self.valid += 1
        return str(value)

    def judged(self, last: Reply) -> Verdict:
        calls = sum(len(reply.calls) for reply in self.replies)
        parts = {"calls": calls, "faults": sum(bool(reply.fault) for reply in self.replies)}
        if last.calls or last.fault:
            return Verdict(reward=0.0, why="ended without an answer", parts=parts)
        if not self.valid:
            return Verdict(reward=0.0, why="no call gave a value", parts=parts)
        found = number_is(last.content, self.problem.truth)
        return Verdict(reward=found.reward, why=found.why, parts=parts)
