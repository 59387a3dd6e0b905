"""How much of a rendered chat will be there again in the next one: where a state is worth keeping.

A later turn renders earlier ones anew: reasoning is dropped, the generation prompt becomes an empty pair of tags, and
some templates add to the last user message. So the chat is rendered once more with another tail, and what both have in
common will stay. One token is given back, as text on both sides of a boundary may share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nautilus.data.chat import ChatSettings, chat_tokens, plain_content
from nautilus.data.tokenizer import Tokenizer

OTHER = "\ue0ff"  # a character that no text begins with


def stable_lengths(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None,
    settings: ChatSettings,
    tokens: Sequence[int],
) -> tuple[int, ...]:
    """Lengths of prefixes of `tokens`, ascending, each the end of something that later prompts may share.

    They are: the system message with the tools; the message before the last one of the user; that one's text; all up to
    where the assistant begins to write.
    """
    kept = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), None)
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    others = [chat_tokens(tokenizer, messages, tools=tools, settings=settings, generate=False)]
    for end in sorted({end for end in (kept, last) if end is not None}):
        others.append(chat_tokens(tokenizer, [*messages[:end], said("")], tools=tools, settings=settings))
    if last is not None:
        text = plain_content(messages[last].get("content"), "user")
        others.append(chat_tokens(tokenizer, [*messages[:last], said(text)], tools=tools, settings=settings))
    return tuple(sorted({length for other in others if (length := common(tokens, other) - 1) > 0}))


def said(text: str) -> dict:
    return {"role": "user", "content": text + OTHER}


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest prefix of both."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def following_turn(
    tokenizer: Tokenizer, messages: Sequence[Mapping], tools: Sequence[Mapping] | None, settings: ChatSettings
) -> list[int]:
    """What the next request of this conversation will begin with, whatever is said in it; its last message is the
    assistant's. After tool calls the next message is a tool's, otherwise the user's."""
    role = "tool" if messages[-1].get("tool_calls") else "user"
    first, second = (
        chat_tokens(tokenizer, [*messages, {"role": role, "content": text}], tools=tools, settings=settings)
        for text in (OTHER, "-")
    )
    return first[: max(0, common(first, second) - 1)]
