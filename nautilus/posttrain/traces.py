"""Recorded answers as tokens: what they were asked, in the order in which they came. JSONL, a trace a line.

    {"prompt": [5, 6], "answer": [7, 8, 9], "limit": 40, "tenant": "", "group": "story 3", "depths": [0, 2, 1]}

`prompt` and `answer` must be there. What a longer request may hold, `limit`, is its length unless it is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nautilus.config.keys import short
from nautilus.data.readers import Decoder, files_at, is_jsonl, lines_of, parse_row
from nautilus.runtime import Progress, UserError, read_metrics, write_atomic
from nautilus.serve.asking import answered
from nautilus.serve.engine import Engine
from nautilus.serve.prompt import Prompt
from nautilus.serve.request import Request
from nautilus.serve.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Trace:
    """limit: most tokens of prompt and answer together; tenant: whose answers it may copy from; group: the same for
    what is alike, as answers to one prompt; depths: at each place of the answer, how many tokens a drafting model has
    right."""

    prompt: Sequence[int]
    answer: Sequence[int]
    limit: int
    tenant: str = ""
    group: str = ""
    depths: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question: the same prompt is asked at several temperatures, each as a tenant of its own."""

    prompt: Prompt
    group: str
    sampling: Sampling

    @property
    def tenant(self) -> str:
        return f"t{self.sampling.temperature:g}"


def read_traces(path: Path) -> list[Trace]:
    """UserError for a line that is no trace."""
    found, decode = [], Decoder()
    for number, raw in enumerate(lines_of(path), 1):
        place = f"{path} line {number}"
        line = decode(raw, place)
        if line and line.strip():
            found.append(trace_of(parse_row(line, place), place))
    if not found:
        raise UserError(f"{path} holds no traces; give a JSONL file of prompts and answers as token ids")
    return found


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(trace)) + "\n" for trace in traces))


def trace_of(row: Any, place: str) -> Trace:
    try:
        prompt, answer, depths = (tokens_in(row.get(name, ())) for name in ("prompt", "answer", "depths"))
        limit = row.get("limit", len(prompt) + len(answer))
        if not prompt or not answer:
            raise ValueError("prompt and answer must be there, and not empty")
        if type(limit) is not int or limit < len(prompt) + len(answer):
            raise ValueError(f"limit={short(limit)} is less than its {len(prompt)} + {len(answer)} tokens")
        if depths and len(depths) != len(answer):
            raise ValueError(f"there are {len(depths)} depths for {len(answer)} tokens")
    except (AttributeError, TypeError, ValueError) as bad:
        raise UserError(f"{place} is no trace: {bad}; it must be as nautilus/posttrain/traces.py says") from bad
    names = {name: str(row.get(name, "")) for name in ("tenant", "group")}
    return Trace(prompt=prompt, answer=answer, limit=limit, depths=depths, **names)


def tokens_in(values: Any) -> tuple[int, ...]:
    if strange := [value for value in values if type(value) is not int or value < 0]:
        raise ValueError(f"{short(strange[0])} stands among its tokens")
    return tuple(values)


# ----- prompts --------------------------------------------------------------------------------------------------------


def read_prompts(places: Sequence[str]) -> Iterator[tuple[str, Prompt]]:
    """(name, prompt), each different one once: of a JSONL file every line's `prompt` or `messages`, of any other the
    whole text; of a folder those of its files."""
    seen: set[str] = set()
    for place in places:
        for name, path in files_at(place):
            for group, prompt in prompts_in(name, path):
                if repr(prompt) not in seen:
                    seen.add(repr(prompt))
                    yield group, prompt


def prompts_in(name: str, path: Path) -> Iterator[tuple[str, Prompt]]:
    decode = Decoder()
    if not is_jsonl(path):
        text = decode(b"".join(lines_of(path)), str(path))
        if text and text.strip():
            yield name, text.removeprefix("\ufeff")
        return
    for number, raw in enumerate(lines_of(path), 1):
        place = f"{path} line {number}"
        line = decode(raw, place)
        if line and line.strip():
            yield f"{name}:{number}", prompt_of(parse_row(line, place), place)


def prompt_of(row: Any, place: str) -> Prompt:
    if isinstance(row, Mapping):
        prompt, messages = row.get("prompt"), row.get("messages")
        if isinstance(prompt, str) and prompt:
            return prompt
        if isinstance(messages, list) and messages and all(isinstance(one, Mapping) for one in messages):
            return messages
    raise UserError(f"{place} has neither a text `prompt` nor a list `messages`; every line must have one of the two")


# ----- answers --------------------------------------------------------------------------------------------------------


def record(engine: Engine, questions: Sequence[Asked], path: Path) -> list[Trace]:
    """The answers to all questions; those that the file has already are not asked for again. A question that has no
    room is left out, and the file says so."""
    rows = read_metrics(path)
    known = {row["index"] for row in rows}
    with Progress(path, len(questions), len(rows), shown=("tokens",), unit="answer") as progress:

        def keep(row: dict) -> None:
            rows.append({"step": len(rows), **row})
            progress(rows[-1])

        def asked() -> Iterator[tuple[tuple[int, Asked], Request]]:
            for index, one in enumerate(questions):
                if index in known:
                    continue
                if request := request_of(engine, one):
                    yield (index, one), request
                else:
                    keep({"index": index, "answer": []})

        for (index, one), request in answered(engine, asked()):
            keep(row_of(request, index, one))
    by_index = sorted((row for row in rows if row["answer"]), key=lambda row: row["index"])
    return [trace_of(row, f"{path} answer {row['index']}") for row in by_index]


def request_of(engine: Engine, asked: Asked) -> Request | None:
    tokens = engine.tokens(asked.prompt)
    if not 0 < len(tokens) < engine.max_tokens - 1:
        return None
    return engine.request(tokens, asked.sampling, tenant=asked.tenant)


def row_of(request: Request, index: int, asked: Asked) -> dict:
    answer = request.tokens[request.prompt :]
    return {
        "index": index, "tokens": len(answer), "tenant": asked.tenant, "group": asked.group, "limit": request.limit,
        "prompt": request.tokens[: request.prompt], "answer": answer,
    }  # fmt: skip
