"""Problems of others: rows of JSON as NeMo Gym has them, with the tasks that judge their answers.

    {"responses_create_params": {"input": [messages], "tools": [...]}, "agent_ref": {"name": ...}, ...}

| task | what a row has beside the messages | right |
|--|--|--|
| `math` | `expected_answer` | the last `\\boxed{}` is worth the same |
| `exact` | `expected_answer`, in a few words | the last box has the same words, or the same number |
| `mcqa` | `expected_answer`, a letter | the last box holds it |
| `code` | `verifier_metadata.unit_tests`: inputs and outputs | the program prints what it should for all of them |
| `instruct` | `instruction_id_list`, `kwargs` | all instructions of IFEval (arXiv 2311.07911) are followed |
| `schema` | `schema` | the answer is JSON that it holds for |
| `call` | `expected_calls` | the same calls with the same arguments, in any order |
| `pivot` | the same, out of conversations (`pivot.py`) | as `call` |

What is no row is refused when the file is read, by its line. What a row lacks is a `GraderBroken` when its answer is
judged, so that a poisoned row costs its own problem and no other.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nautilus.runtime import json_lines
from nautilus.tasks.arithmetic import NUMBER
from nautilus.tasks.equal import same_value, same_words
from nautilus.tasks.instructions import followed
from nautilus.tasks.knowing import BOXED, letter_is
from nautilus.tasks.programs import passes
from nautilus.tasks.task import GraderBroken, Message, Problem, Question, Reply, Task, Verdict


def problem_of(row: Mapping[str, Any], task: str, *, level: int = 1) -> Problem:
    """ValueError for a row without messages, or with something else in the place of messages or tools."""
    given = row.get("responses_create_params")
    asked: Mapping = given if isinstance(given, Mapping) else {}
    messages = asked.get("input")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(
            f"the row has no messages; responses_create_params.input must be a list of them: {str(row)[:200]}"
        )
    worked, tools = row.get("worked") or [], asked.get("tools") or []
    if not isinstance(worked, list) or not all(isinstance(one, Mapping) for one in worked):
        raise ValueError(f"the row's worked answer must be a list of messages: {str(worked)[:200]}")
    if not isinstance(tools, list):
        raise ValueError(f"the row's tools must be a list: {str(tools)[:200]}")
    truth = {key: value for key, value in row.items() if key not in ("responses_create_params", "worked")}
    return Problem(
        task=task, level=level, messages=tuple(messages), truth=truth, worked=tuple(worked),
        tools=tuple(map(chat_tool, tools)),
    )  # fmt: skip


def row_of(problem: Problem) -> dict[str, Any]:
    """The other way round."""
    asked = {"input": [*problem.messages], **({"tools": [*map(row_tool, problem.tools)]} if problem.tools else {})}
    truth = problem.truth if isinstance(problem.truth, Mapping) else {"expected_answer": problem.truth}
    agent = {"type": "responses_api_agents", "name": problem.task}
    return {
        "responses_create_params": asked, "agent_ref": agent, **truth, "level": problem.level,
        "worked": [*problem.worked],
    }  # fmt: skip


def posed(row: Mapping[str, Any], task: Task) -> Problem:
    """The problem that a row is for this task, by whatever name its truth went in; ValueError as above."""
    problem = problem_of(row, task.name, level=row["level"] if isinstance(row.get("level"), int) else 1)
    if isinstance(task, Rows):
        return problem
    truth = {key: value for key, value in problem.truth.items() if key not in ("agent_ref", "level", "response")}
    return replace(problem, truth=truth.get("expected_answer", truth))


def chat_tool(tool: Any) -> Message:
    """A function as a chat template is told of it; a row has it flat. ValueError for what is none."""
    inside = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    if not isinstance(inside, Mapping) or not isinstance(inside.get("name"), str):
        raise ValueError(f"the row has a tool without a name: {str(tool)[:200]}")
    told = {key: inside[key] for key in ("name", "description", "parameters") if inside.get(key) is not None}
    return {"type": "function", "function": {**told, **({"strict": True} if inside.get("strict") else {})}}


def row_tool(tool: Message) -> dict[str, Any]:
    return {"type": "function", "strict": False, **tool["function"]}


class Rows(Question):
    """Of a file, in the order that a seed gives. `grade` of a kind is in KINDS."""

    def __init__(self, kind: str, rows: Sequence[Mapping[str, Any]]):
        if kind not in KINDS:
            raise ValueError(f"rows of the task {kind!r} were asked for; there are {', '.join(KINDS)}")
        if not rows:
            raise ValueError(f"the task {kind} has no rows")
        self.name, self.rows = kind, [problem_of(row, kind) for row in rows]

    def draw(self, rng: random.Random, level: int) -> Problem:
        return rng.choice(self.rows)

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        try:
            return KINDS[self.name](problem.truth, reply)
        except (KeyError, TypeError, AttributeError) as bad:
            raise GraderBroken(f"problem {problem.id} of {self.name} lacks what it is judged by: {bad!r}") from bad


Check = Callable[[dict[str, Any]], object]


def rows_in(path: Path, check: Check = lambda row: None) -> Iterator[dict[str, Any]]:
    """Of a file of JSON lines; ValueError that names the line that is none, or that `check` raises one for."""
    for number, row in json_lines(path):
        try:
            check(row)
        except (ValueError, TypeError, LookupError, AttributeError) as bad:
            why = f"there is no {bad.args[0]!r}" if isinstance(bad, KeyError) else repr(bad)
            why = str(bad) if isinstance(bad, ValueError) else why
            raise ValueError(f"{path}, line {number}: {why}") from bad
        yield row


# ----- who judges -----------------------------------------------------------------------------------------------------


def math(truth: Mapping[str, Any], reply: Reply) -> Verdict:
    """What is boxed last, or the last number where nothing is. A truth like GSM8K's stands after ####."""
    wanted = str(truth["expected_answer"]).rpartition("####")[2].strip()
    found = BOXED.findall(reply.content) or NUMBER.findall(reply.content.replace(",", ""))
    said = innermost(reply.content) or (found[-1] if found else "")
    if not said:
        return Verdict(reward=0.0, why="no answer in a box, and no number")
    return Verdict(reward=float(same_value(said, wanted)), why=f"{said[:80]!r}, {wanted!r}")


def exact(truth: Mapping[str, Any], reply: Reply) -> Verdict:
    said, wanted = innermost(reply.content), str(truth["expected_answer"])
    if not said:
        return Verdict(reward=0.0, why="no answer in a box")
    return Verdict(reward=float(same_words(said, wanted)), why=f"{said[:80]!r}, {wanted!r}")


def innermost(text: str) -> str:
    """What the last box holds, with braces inside it."""
    begin, depth = text.rfind("\\boxed{"), 0
    for at in range(begin + 6, len(text)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin + 7 : at].strip()
    return ""


def code(truth: Mapping[str, Any], reply: Reply) -> Verdict:
    tests = truth["verifier_metadata"]["unit_tests"]
    return passes(reply.content, tests["inputs"], tests["outputs"])


def schema(truth: Mapping[str, Any], reply: Reply) -> Verdict:
    """The answer must be JSON as it is."""
    try:
        import jsonschema
    except ImportError as bad:
        raise GraderBroken("schemas are checked with the library jsonschema, of the extra rl") from bad
    wanted = truth["schema"]
    wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
    try:
        jsonschema.validate(json.loads(reply.content), wanted)
    except jsonschema.ValidationError as wrong:
        return Verdict(reward=0.0, why=wrong.message[:200])
    except jsonschema.SchemaError as bad:
        raise GraderBroken(f"the problem's schema is none: {bad.message[:200]}") from bad
    except (ValueError, RecursionError):
        return Verdict(reward=0.0, why="the answer is no JSON")
    return Verdict(reward=1.0, why="of the schema")


def called(calls: Iterable[tuple[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(one, sort_keys=True, ensure_ascii=False) for one in calls)


def call(truth: Mapping[str, Any], reply: Reply) -> Verdict:
    wanted = called((one["name"], arguments_of(one)) for one in truth["expected_calls"])
    said = called((one.name, dict(one.arguments)) for one in reply.calls)
    return Verdict(reward=float(bool(wanted) and said == wanted), why=f"{dict(said)}, {dict(wanted)}"[:200])


def arguments_of(one: Mapping[str, Any]) -> Any:
    given = one["arguments"]
    return json.loads(given) if isinstance(given, str) else given


KINDS = {
    "math": math,
    "mcqa": lambda truth, reply: letter_is(reply.content, truth["expected_answer"]),
    "exact": exact,
    "code": code,
    "instruct": lambda truth, reply: followed(reply.content, truth["instruction_id_list"], truth["kwargs"]),
    "schema": schema,
    "call": call,
    "pivot": call,
}
