"""Finished conversations as samples to learn from: tokens, and how much each counts.

Tokens that an assistant wrote count, the end of its turn included; all else is given. Where an assistant thought, a
conversation becomes a sample for each question: history has no thinking in it, so what was thought before the question
is dropped, as it will be when the model is asked, and only what follows the question counts.

| loss | a token's weight |
|--|--|
| `token` | 1: long answers say more |
| `sample` | 1 / tokens that count in its sample: every conversation says as much |

Some are changed, so that a model can be told how to think (Nemotron 3 Nano, Super, Ultra; Llama-Nemotron):

| share | what becomes of a sample with thinking |
|--|--|
| `off` | without it, under a template that is told so |
| `cut` | the last thought to a random length and closed there; the answer stays, that closing does not count |
| `toggle` | its system message says `detailed thinking on`; without thinking, `detailed thinking off` |
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nautilus.data.chat import DEFAULT, ROLES, ChatSettings, supervised_tokens
from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError, json_lines

THOUGHT = "</think>"
LOSSES = ("token", "sample")
UNWRITTEN = "no chat can be made of them"
Sample = tuple[list[int], list[float]]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """effort: what its question asks for, low or medium; None for full; where: it stands, for people."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    effort: str | None = None
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How conversations become samples. off, cut: shares of those with thinking; length: most tokens of a sample."""

    length: int = 1024
    loss: str = "token"
    off: float = 0.0
    cut: float = 0.0
    toggle: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise UserError(f"loss={self.loss!r} was asked for; there are {' and '.join(LOSSES)}")
        if not (0 <= self.off <= 1 and 0 <= self.cut <= 1 and self.off + self.cut <= 1):
            raise UserError(f"off={self.off} and cut={self.cut} were asked for; they are shares, together at most 1")


@dataclass(frozen=True, kw_only=True)
class Taught:
    """left_out: conversations that make no sample, by why; first: an example of each, where one is told of."""

    samples: list[Sample]
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)


def taught(tokenizer: Tokenizer, conversations: Iterable[Conversation], how: Teaching) -> Taught:
    found = Taught(samples=[])
    for number, one in enumerate(conversations):
        if why := fault(one):
            found.left_out[why] += 1
            continue
        rng = random.Random(f"{how.seed} {number}")
        try:
            samples = [sample(tokenizer, part, how, rng) for part in by_question(one)]
        except (ValueError, TypeError, AttributeError, LookupError) as bad:  # of a file's row: anything may be in it
            found.left_out[UNWRITTEN] += 1
            found.first.setdefault(UNWRITTEN, f"{one.where or f'number {number + 1}'}: {bad}"[:300])
            continue
        for tokens, weights in samples:
            if len(tokens) > how.length:
                found.left_out["too long"] += 1
            elif not any(weights):
                found.left_out["nothing to learn"] += 1
            else:
                found.samples.append((tokens, weights))
    return found


def fault(one: Conversation) -> str:
    """Why it cannot be learnt from; "" if it can."""
    roles = [str(message.get("role")) for message in one.messages]
    if strange := [role for role in roles if role not in ROLES]:
        return f"the role {strange[0]}, for which there are {', '.join(ROLES)}"
    if "assistant" not in roles:
        return "no answer"
    before = "system"
    for role in roles:
        allowed = {"system": ("system", "user"), "user": ("assistant",), "assistant": ("user", "tool")}
        if role not in (*allowed.get(before, ("tool", "assistant")), *(["tool"] if before == "tool" else [])):
            return f"{role} after {before}"
        before = role
    calls = any(message.get("tool_calls") for message in one.messages)
    return "calls without tools" if calls and not one.tools else ""


def thinks(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" and bool(message.get("reasoning_content"))


def by_question(one: Conversation) -> Iterator[Conversation]:
    """A part for each question of a user, with what follows it, or all of it where nobody thought."""
    if not any(map(thinks, one.messages)):
        yield one
        return
    asked = [at for at, message in enumerate(one.messages) if message.get("role") == "user"]
    for begin, end in zip(asked, [*asked[1:], len(one.messages)], strict=True):
        if any(message.get("role") == "assistant" for message in one.messages[begin:end]):
            yield dataclasses.replace(one, messages=one.messages[:end])


def sample(tokenizer: Tokenizer, one: Conversation, how: Teaching, rng: random.Random) -> Sample:
    messages, settings, closed = [dict(message) for message in one.messages], DEFAULT, False
    if any(map(thinks, messages)):
        draw = rng.random()
        if draw < how.off:
            messages = [without(message) for message in messages]
            settings = ChatSettings(enable_thinking=False)
        elif closed := draw < how.off + how.cut and thinks(messages[-1]):
            messages[-1] = shortened(tokenizer, messages[-1], rng)
    if how.toggle:
        messages = toggled(messages, on=any(map(thinks, messages)))
    settings = dataclasses.replace(settings, effort=one.effort)
    tokens, written = supervised_tokens(tokenizer, messages, tools=one.tools, settings=settings)
    if closed and (close := tokenizer.control.get(THOUGHT)) in tokens:
        written[len(tokens) - 1 - tokens[::-1].index(close)] = False
    count = sum(written)
    each = 1.0 if how.loss == "token" else 1.0 / max(1, count)
    return tokens, [each * own for own in written]


def without(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def shortened(tokenizer: Tokenizer, message: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Its thinking ends after some of its tokens; the answer is as it was."""
    tokens = tokenizer.encode(message.get("reasoning_content") or "")
    kept = tokenizer.decode(tokens[: rng.randint(1, len(tokens))]) if tokens else ""
    return {**message, "reasoning_content": kept.replace("\ufffd", "")}


def toggled(messages: Sequence[dict[str, Any]], *, on: bool) -> list[dict[str, Any]]:
    """The system message of Llama-Nemotron (arXiv 2505.00949), before what the system says already."""
    words = f"detailed thinking {'on' if on else 'off'}"
    if messages[0].get("role") == "system":
        said = messages[0].get("content") or ""
        return [{**messages[0], "content": f"{words}\n\n{said}" if said else words}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def conversations_in(path: Path) -> Iterator[Conversation]:
    """Of a file of JSON lines: {"messages": [...], "tools": [...], "effort": "low"}. UserError that names the line."""
    for number, row in json_lines(path):
        messages, where = row.get("messages"), f"{path}, line {number}"
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            form = '{"messages": [{"role": "user", "content": ...}, ...]}'
            raise UserError(f"{where}, has no messages; write {form}")
        yield Conversation(messages=messages, tools=row.get("tools"), effort=row.get("effort"), where=where)
