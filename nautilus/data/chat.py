"""Messages → token ids, by a chat template.

Control tokens come from the template's own words only, so nobody can write `<|im_end|>` into a message and end the
turn. Where no message holds such words, the tokens are exactly those of the rendered text.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nautilus.data.template import render_template
from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError

ROLES = ("system", "user", "assistant", "tool")
EFFORTS = {"low": "low_effort", "medium": "medium_effort"}
RESERVED = {
    "messages",
    "tools",
    "add_generation_prompt",
    "chat_template",
    "documents",
    "conversation",
    *EFFORTS.values(),
}
THINKING_TAGS = frozenset(["<think>", "</think>"])
BRACKETS = "<>[]|/"
PRIVATE = re.compile("[\ue000-\uf8ff]")


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """What a template is told besides the messages. `variables` are for templates of other makers."""

    enable_thinking: bool = True
    truncate_history_thinking: bool = True
    effort: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.effort is not None and self.effort not in EFFORTS:
            raise UserError(f"effort={self.effort!r} is none of {', '.join(EFFORTS)}; leave it out for full effort")
        taken = sorted(RESERVED & set(self.variables))
        if taken:
            raise UserError(f"template variables {taken} are set by the renderer itself; leave them out")


DEFAULT = ChatSettings()


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    *,
    tools: Sequence[Mapping] | None = None,
    generate: bool = True,
    settings: ChatSettings = DEFAULT,
) -> str:
    """The text of a conversation; with `generate`, up to where the assistant begins to write. For people to read."""
    return Conversation(tokenizer, [tidy(message) for message in messages], tools, settings, mark="").text(generate)


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    *,
    tools: Sequence[Mapping] | None = None,
    generate: bool = True,
    settings: ChatSettings = DEFAULT,
) -> list[int]:
    """The tokens of a conversation. No word of a message, a tool or a setting can become a control token."""
    conversation = shielded(tokenizer, messages, tools, settings)
    return conversation.tokens(conversation.text(generate))


def following_tokens(
    tokenizer: Tokenizer,
    before: Sequence[Mapping],
    told: Sequence[Mapping],
    *,
    tools: Sequence[Mapping] | None = None,
    settings: ChatSettings = DEFAULT,
) -> list[int]:
    """The tokens between the end of an assistant's turn and the beginning of its next one, where `before` stands before
    that turn and `told` after it. They do not depend on what the turn says: so a conversation goes on from the tokens
    that were drawn, and is never encoded again. UserError for a template that writes turns in another way."""
    conversation = shielded(tokenizer, [*before, {"role": "assistant", "content": "."}, *told], tools, settings)
    whole = conversation.text(True)
    span = conversation.written_span(len(before), whole)
    if not span:
        raise UserError(
            "this chat template writes an assistant's turn differently once others follow, so a conversation cannot go"
            " on from the tokens that were drawn; give a template that does not, or tasks of one turn"
        )
    return conversation.tokens(whole[span[1] :])


def supervised_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    *,
    tools: Sequence[Mapping] | None = None,
    settings: ChatSettings = DEFAULT,
) -> tuple[list[int], list[bool]]:
    """The tokens of a finished conversation, and for each whether the assistant wrote it.

    A turn counts as written when the conversation before it, with the generation prompt, is how the whole text begins:
    that is what the assistant would have seen. So the opening of a turn, `<think>` included, is given, not written; the
    end of the turn is written; and a turn whose reasoning was dropped from the history teaches nothing.
    """
    conversation = shielded(tokenizer, messages, tools, settings)
    whole = conversation.text(False)
    tokens: list[int] = []
    written: list[bool] = []
    edges = [edge for i in range(len(messages)) for edge in conversation.written_span(i, whole)]
    for i, (start, end) in enumerate(zip([0, *edges], [*edges, len(whole)], strict=True)):
        piece = conversation.tokens(whole[start:end])
        tokens += piece
        written += [i % 2 == 1] * len(piece)
    return tokens, written


@dataclass(frozen=True)
class Conversation:
    """Tidy messages with all that rendering them needs. See `shielded` for the mark."""

    tokenizer: Tokenizer
    messages: list[dict]
    tools: Sequence[Mapping] | None
    settings: ChatSettings
    mark: str

    def text(self, generate: bool) -> str:
        if self.tokenizer.template is None:
            raise UserError("this tokenizer has no chat template; use a chat model, or plain text instead of messages")
        settings = self.settings
        variables = {
            **self.tokenizer.words,
            "enable_thinking": settings.enable_thinking,
            "truncate_history_thinking": settings.truncate_history_thinking,
            **settings.variables,
            "messages": self.messages,
            "tools": list(self.tools) if self.tools else None,
            "add_generation_prompt": generate,
        }
        if settings.effort is not None:
            variables[EFFORTS[settings.effort]] = True
        return render_template(self.tokenizer.template, variables)

    def tokens(self, text: str) -> list[int]:
        """Control tokens as found in the marked text; the plain text between them without its marks."""
        tokens: list[int] = []
        for i, piece in enumerate(guard_of(frozenset(self.tokenizer.control)).pattern.split(text)):
            tokens += [self.tokenizer.control[piece]] if i % 2 else self.tokenizer.encode(piece.replace(self.mark, ""))
        return tokens

    def written_span(self, i: int, whole: str) -> tuple[int, int] | tuple[()]:
        """Where the text of message i, as written by the assistant, begins and ends; nothing if it cannot be known."""
        if self.messages[i]["role"] != "assistant":
            return ()
        through = dataclasses.replace(self, messages=self.messages[: i + 1]).text(False)
        if not whole.startswith(through):
            return ()
        for thinking in (True, False):
            settings = dataclasses.replace(self.settings, enable_thinking=thinking)
            prompt = dataclasses.replace(self, messages=self.messages[:i], settings=settings).text(True)
            if through.startswith(prompt):
                end_of_turn = self.tokenizer.words["eos_token"]
                end = through.rfind(end_of_turn, len(prompt))
                return len(prompt), (end + len(end_of_turn) if end >= 0 else len(through))
        return ()


class Guard(NamedTuple):
    """What to look for in text that must not take part in a control token."""

    pattern: re.Pattern
    heads: frozenset[str]
    tails: frozenset[str]
    cores: frozenset[str]
    longest: int


@functools.lru_cache(maxsize=8)
def guard_of(control: frozenset[str]) -> Guard:
    longest_first = sorted(control, key=lambda word: (-len(word), word))
    return Guard(
        pattern=re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})"),
        heads=frozenset(word[:k] for word in control for k in range(1, len(word))),
        tails=frozenset(word[k:] for word in control for k in range(1, len(word))),
        cores=frozenset(word.strip(BRACKETS) for word in control),
        longest=max(map(len, control), default=0),
    )


def shielded(tokenizer: Tokenizer, messages: Sequence[Mapping], tools, settings: ChatSettings) -> Conversation:
    """The conversation with a mark inside and beside all words that are, or could complete, a control token.

    The mark is a private-use character that occurs nowhere else, so control tokens can be searched in the rendered text
    while the marks are in it. This works with every template, because only words that look like control tokens change.
    """
    clean = [tidy(message) for message in messages]
    try:
        return marked(tokenizer, clean, tools, settings)
    except RecursionError as bad:
        raise UserError(
            "the messages, tools or settings hold lists and objects within each other too deep to be read; make them"
            " flatter, the arguments of tool calls too"
        ) from bad


def marked(tokenizer: Tokenizer, clean: list[dict], tools, settings: ChatSettings) -> Conversation:
    """The same of tidy messages."""
    everything = json.dumps(
        [tokenizer.template, clean, tools, dict(settings.variables)], ensure_ascii=False, default=str
    )
    taken = set(PRIVATE.findall(everything))
    mark = next((char for char in map(chr, range(0xE000, 0xF900)) if char not in taken), None)
    if mark is None:
        raise UserError("the messages hold all 6,400 private-use characters from U+E000 on; leave one of them out")
    guard = guard_of(frozenset(tokenizer.control))
    return Conversation(
        tokenizer,
        [shield_message(message, guard, mark) for message in clean],
        shield(tools, guard, mark),
        dataclasses.replace(settings, variables=shield(settings.variables, guard, mark)),
        mark,
    )


def shield_message(message: dict, guard: Guard, mark: str) -> dict:
    """All but the role, which is one of ours and which templates compare."""
    role, content = message["role"], message["content"]
    # Without a field of its own, reasoning sits inside the assistant's content, and its tags keep their meaning.
    inline = role == "assistant" and not message.get("reasoning_content")
    shown = shield_text(content, guard, mark, keep=THINKING_TAGS if inline else frozenset())
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"role": role, "content": shown, **shield(rest, guard, mark)}


def shield(value: Any, guard: Guard, mark: str) -> Any:
    if isinstance(value, str):
        return shield_text(value, guard, mark)
    if isinstance(value, Mapping):
        return {shield(key, guard, mark): shield(item, guard, mark) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shield(item, guard, mark) for item in value]
    return value


def shield_text(text: str, guard: Guard, mark: str, keep: frozenset[str] = frozenset()) -> str:
    text = guard.pattern.sub(lambda found: found[0] if found[0] in keep else mark.join(found[0]), text)
    body = text.strip()  # templates may trim, so the marks go where the trimmed text begins and ends
    if not body:
        return text
    lengths = range(1, min(len(body), guard.longest) + 1)
    core = body.strip(BRACKETS) in guard.cores and body not in keep
    before = mark if core or any(body[:k] in guard.tails for k in lengths) else ""
    after = mark if any(body[-k:] in guard.heads for k in lengths) else ""
    start = text.index(body)
    return text[:start] + before + body + after + text[start + len(body) :]


def tidy(message: Mapping) -> dict:
    """One message in the shape templates expect: a known role, text content, tool arguments as objects."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise UserError(f"a message has role {role!r}; use one of {', '.join(ROLES)}")
    clean = {key: value for key, value in message.items() if value is not None}
    reasoning = clean.pop("reasoning", None)  # another name of the same field
    if reasoning is not None:
        clean.setdefault("reasoning_content", reasoning)
    if "tool_calls" in clean:
        clean["tool_calls"] = [tidy_call(call) for call in clean["tool_calls"]]
    return {**clean, "role": role, "content": plain_content(message.get("content"), role)}


def plain_content(content, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(part.get("text", "") for part in content)
    raise UserError(f"the content of a {role} message is {str(content)[:80]!r}; this model reads text or text parts")


def tidy_call(call: Mapping) -> dict:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as bad:  # the former also of numbers that are too long
            raise UserError(
                f"arguments of tool call {function.get('name')!r} are not JSON that can be read ({bad}); send an object"
            ) from bad
    if not isinstance(arguments, Mapping):
        raise UserError(f"arguments of tool call {function.get('name')!r} are {str(arguments)[:80]}; send an object")
    return {"type": "function", "function": {"name": function.get("name"), "arguments": dict(arguments)}}
