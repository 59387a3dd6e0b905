"""Six families of prompts on which speculative decoding is compared, and the sixteen sets of the paper among them.

Hybrid Verified Decoding (arXiv 2606.01019) shows that drafts copied from known text pay where a prompt has structure:
documents to edit, schemas, output of tools that comes again. So its sets are grouped by what is asked for.

A `Prompt` is a text to be continued or a chat, with the answer that its publisher gives, where there is one. Who has no
chat template asks `text`: the messages written one after another under their roles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "agentic": "agentic and workflow",
    "code": "code and repository",
    "structured": "structured output",
    "multihop": "multi-hop questions",
    "long": "long context",
    "open": "open-ended",
}
# The sets of the paper and their families, as its readers list them.
PAPER = {
    "delegate52": "agentic",
    "fineedit": "agentic",
    "repobench": "code",
    "swebench_openhands": "code",
    "magicoder": "code",
    "mbpp": "code",
    "bfcl": "structured",
    "spider": "structured",
    "hotpotqa": "multihop",
    "musique": "multihop",
    "2wikimultihopqa": "multihop",
    "infinitebench": "long",
    "cnn_dailymail": "long",
    "govreport": "long",
    "alpaca": "open",
    "mt_bench": "open",
}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked: `prompt` as text to be continued, or else `messages` of a chat, perhaps with tools.

    reference: what should come, as text; "" where the set has no answer. id: unique in its set.
    """

    id: str
    family: str
    set: str
    prompt: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    reference: str = ""

    def __post_init__(self):
        if self.family not in FAMILIES or bool(self.prompt) == bool(self.messages):
            raise ValueError(f"{self.set} {self.id}: {self.family!r} is no family, or not one of prompt and messages")

    @property
    def text(self) -> str:
        """All of it as text to be continued; what a turn says is written as `said` writes it."""
        if self.prompt:
            return self.prompt
        tools = "".join(f"{plain(tool.get('function', tool))}\n" for tool in self.tools)
        turns = [f"{each['role'].capitalize()}:\n{said(each)}\n\n" for each in self.messages]
        return "".join([f"Tools:\n{tools}\n" if tools else "", *turns, "Assistant:\n"])


def asked(set: str, family: str, id: Any, words: str, reference: str = "") -> Prompt:
    """A chat of one message."""
    messages = ({"role": "user", "content": words},)
    return Prompt(id=str(id), family=family, set=set, messages=messages, reference=reference)


def said(message: Mapping[str, Any]) -> str:
    """A turn as text: its content, then a line of JSON for each call of a tool."""
    calls = [plain(call.get("function", call)) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in (message.get("content") or "", *calls) if part)


def plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def chosen(prompts: Iterable[Prompt], count: int, seed: int = 0) -> list[Prompt]:
    """So many of them, the same ones whatever their order and whatever else is there: those of the lowest hashes."""
    key = lambda one: hashlib.sha256(f"{seed} {one.set} {one.id}".encode()).digest()
    return sorted(prompts, key=key)[:count]
