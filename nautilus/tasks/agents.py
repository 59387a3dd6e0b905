"""Things to get done with tools, judged by what is left in the end and not by the way.

| task | asked | right |
|--|--|--|
| `store` | to move, copy, swap or delete values of a store, `level` of them | the store has exactly what it should |
| `repair` | to mend a program of a small stack machine | it gives what hidden runs should give |

A call that cannot be read, or that asks for what is not there, is answered with an error, and the model goes on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nautilus.tasks.machine import LARGE, SMALL, broken, gives, read, run, telling, told_program
from nautilus.tasks.task import Call, Episode, Message, Problem, Reply, Task, Verdict, assistant, told, tool, user

WORDS = "red blue green gold grey pink black white north south east west sun moon star rain snow wind".split()
STORE = (
    tool("get", "The value of a key.", key="the key"),
    tool("put", "Sets the value of a key.", key="the key", value="the value"),
    tool("remove", "Removes a key and its value.", key="the key"),
)


class Acting(Episode):
    """Calls are answered one by one; a reply without any ends it."""

    def answer(self, reply: Reply) -> Sequence[Message]:
        if reply.fault:
            return [told(f"error: {reply.fault}")]
        return [told(self.done(call)) for call in reply.calls]

    def done(self, call: Call) -> str:
        functions = {one["function"]["name"]: one["function"]["parameters"]["required"] for one in self.problem.tools}
        if call.name not in functions:
            return f"error: there is no tool {call.name!r}; there are {', '.join(functions)}"
        if sorted(call.arguments) != sorted(needed := functions[call.name]):
            return f"error: {call.name} takes {', '.join(needed)}"
        try:
            return getattr(self, f"do_{call.name}")(**{key: str(value) for key, value in call.arguments.items()})
        except ValueError as bad:
            return f"error: {bad}"

    def parts(self) -> dict[str, float]:
        return {
            "calls": sum(len(reply.calls) for reply in self.replies),
            "faults": sum(bool(reply.fault) for reply in self.replies),
        }


class Store(Task):
    name, levels, turns = "store", range(1, 4), 12
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        keys = rng.sample(WORDS, level + 3)
        before = {key: str(rng.randint(10, 99)) for key in keys[: level + 2]}
        after, asked, course = dict(before), list[str](), list[Message]()
        for _ in range(level):
            words, calls = change(rng, after, keys[-1])
            asked.append(words)
            for call in calls:
                answer = applied(after, call)
                course += [assistant("", calls=[call]), told(answer)]
        return Problem(
            task=self.name, level=level, messages=user("; then ".join(asked)), tools=STORE,
            truth={"before": before, "after": after}, worked=(*course, assistant("done")),
        )  # fmt: skip

    def episode(self, problem: Problem) -> Episode:
        return Keeping(problem)


def change(rng: random.Random, store: dict[str, str], free: str) -> tuple[str, list[Call]]:
    """One thing to be done to the store, in words, and the calls that do it. free: a key that may not be there."""
    have = sorted(store)
    first, second = rng.sample(have, 2)
    kind = rng.choice(["copy", "set", "remove", "move"] if len(have) > 3 else ["copy", "set"])
    get, remove = (Call(name=name, arguments={"key": first}) for name in ("get", "remove"))
    put = lambda key, value: Call(name="put", arguments={"key": key, "value": value})
    match kind:
        case "copy":
            return f"copy {first} to {second}", [get, put(second, store[first])]
        case "set":
            value = str(rng.randint(10, 99))
            return f"set {first} to {value}", [put(first, value)]
        case "remove":
            return f"remove {first}", [remove]
        case _:
            return f"move {first} to {free}", [get, put(free, store[first]), remove]


def applied(store: dict[str, str], call: Call) -> str:
    """What the tool answers; the store is changed by it."""
    key = call.arguments["key"]
    match call.name:
        case "put":
            store[key] = str(call.arguments["value"])
            return "ok"
        case "remove" if key in store:
            del store[key]
            return "ok"
        case "get" if key in store:
            return store[key]
    return f"error: there is no key {key!r}"


class Keeping(Acting):
    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.store = dict(problem.truth["before"])

    def state(self) -> dict[str, str]:
        return self.store

    def do_get(self, key: str) -> str:
        return applied(self.store, Call(name="get", arguments={"key": key}))

    def do_put(self, key: str, value: str) -> str:
        return applied(self.store, Call(name="put", arguments={"key": key, "value": value}))

    def do_remove(self, key: str) -> str:
        return applied(self.store, Call(name="remove", arguments={"key": key}))

    def judged(self, last: Reply) -> Verdict:
        want = self.problem.truth["after"]
        wrong = sorted(key for key in want.keys() | self.store.keys() if want.get(key) != self.store.get(key))
        why = f"wrong: {', '.join(wrong)}" if wrong else "the store is as it should be"
        return Verdict(reward=float(not wrong), why=why, parts=self.parts())


# ----- a program to mend ----------------------------------------------------------------------------------------------

REPAIR = (
    tool("run", "What the program gives for an input.", input={"type": "integer", "description": "a number"}),
    tool(
        "edit", "Replaces a line of the program.", line={"type": "integer", "description": "its number"},
        instruction="what stands there then",
    ),
)  # fmt: skip


class Repair(Task):
    """Levels are lines beyond two. One line is wrong; what it should be follows from the examples that are shown."""

    name, levels, turns = "repair", range(1, 5), 8
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        right, wrong, line = broken(rng, level + 2)
        shown, hidden = telling(rng, right, wrong, SMALL, 3), telling(rng, right, wrong, LARGE, 5)
        examples = "\n".join(f"{value} gives {run(right, value)}" for value in shown)
        asked = f"Mend one line of this program.\n{told_program(wrong)}\nIt should do this:\n{examples}"
        edit = Call(name="edit", arguments={"line": line + 1, "instruction": right[line]})
        return Problem(
            task=self.name, level=level, messages=user(asked), tools=REPAIR,
            truth={"program": wrong, "runs": [[value, run(right, value)] for value in hidden]},
            worked=(assistant("", calls=[edit]), told("ok"), assistant("done")),
        )  # fmt: skip

    def episode(self, problem: Problem) -> Episode:
        return Mending(problem)


class Mending(Acting):
    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.program = [*problem.truth["program"]]

    def state(self) -> list[str]:
        return self.program

    def do_run(self, input: str) -> str:
        return str(run(self.program, int(input)))

    def do_edit(self, line: str, instruction: str) -> str:
        at = int(line) - 1
        if not 0 <= at < len(self.program):
            raise ValueError(f"the program has lines 1 to {len(self.program)}")
        read(instruction)
        self.program[at] = instruction
        return "ok"

    def judged(self, last: Reply) -> Verdict:
        runs = self.problem.truth["runs"]
        right = sum(gives(self.program, value) == want for value, want in runs)
        parts = {**self.parts(), "runs": right / len(runs)}
        return Verdict(reward=float(right == len(runs)), why=f"{right} of {len(runs)} hidden runs", parts=parts)
