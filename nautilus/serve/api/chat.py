"""POST /v1/chat/completions: a conversation to be answered."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field

from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.runtime import UserError
from nautilus.serve.api.answer import ChatChoice, Wanted
from nautilus.serve.api.chunks import Chunks
from nautilus.serve.api.constraints import ResponseFormat, StructuredOutputs, ToolChoice, called, rules_of
from nautilus.serve.api.context import Context, Prepared, fitted
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.fields import Asked, Record, check_sizes, read, sampling_of
from nautilus.serve.api.marks import following_turn, stable_lengths
from nautilus.serve.api.messages import (
    ChatInput,
    chat_settings,
    check_continued,
    plain_messages,
    plain_tools,
    wants_content,
    without_end,
)
from nautilus.serve.control import opens_thinking
from nautilus.serve.job import Job
from nautilus.serve.markers import OPEN
from nautilus.serve.toolcalls import AnswerStream

log = logging.getLogger("nautilus.serve.api")


class ChatRequest(Asked, ChatInput):
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# Of our own and of other servers: what the other APIs take as it is, besides their own fields.
EXTENSIONS = {
    "seed", "min_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos",
    "stop", "stop_token_ids", "bad_words", "logit_bias", "structured_outputs", "chat_template_kwargs",
    "thinking_token_budget", "thinking_token_grace", "cache_salt", "priority",
}  # fmt: skip


def as_chat(asked: Record, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat for a request of another API: these fields, and extensions that it has."""
    extensions = {name: value for name, value in (asked.model_extra or {}).items() if name in EXTENSIONS}
    return {name: value for name, value in {**extensions, **fields}.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    messages: Sequence[Mapping]
    tools: Sequence[Mapping] | None
    settings: ChatSettings
    tokens: list[int]


def render(context: Context, asked: ChatInput) -> Rendered:
    """The tokens of a chat, up to where the assistant begins to write or goes on."""
    messages = plain_messages(asked, context.limits)
    check_continued(messages, asked)
    known = plain_tools(asked.tools, context.limits)
    settings = chat_settings(asked, context.tokenizer)
    generate = not asked.continue_final_message and asked.add_generation_prompt is not False
    tokens = chat_tokens(context.tokenizer, messages, tools=known, settings=settings, generate=generate)
    if asked.continue_final_message:
        tokens = without_end(tokens, context.tokenizer)
    return Rendered(messages=messages, tools=known, settings=settings, tokens=tokens)


def prepare(context: Context, body: Mapping[str, Any], owner: str) -> Prepared:
    """The jobs of a request. ApiError and UserError for what cannot be done."""
    asked = read(ChatRequest, body)
    context.check_model(asked.model)
    check_sizes(asked, context.limits)
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    if asked.echo:
        raise ApiError(400, "echo is for /v1/completions; leave it out", param="echo", code="unsupported")
    rendered = render(context, asked)
    job = first_job(context, asked, rendered, context.tenant(owner, asked.cache_salt))
    inside = opens_thinking(job.tokens, context.tokenizer)
    choices = [choice(context, asked, rendered, inside, number) for number in range(asked.n or 1)]
    return Prepared(
        asked=asked, jobs=[numbered(job, i) for i in range(len(choices))], choices=choices,
        form=Chunks(
            asked, name="chat.completion", chunk_name="chat.completion.chunk", prefix="chatcmpl-",
            opening={"prompt_token_ids": job.tokens} if asked.return_token_ids else {},
        ),
        following=partial(following, context, rendered, job, choices),
    )  # fmt: skip


def first_job(context: Context, asked: ChatRequest, rendered: Rendered, tenant: str) -> Job:
    tokenizer = context.tokenizer
    tokens, longest = fitted(context, rendered.tokens, asked, asked.longest, default=None)
    how = sampling_of(asked, context.sampling, tokenizer, longest=longest, tops=asked.top_logprobs or 0)
    if not callable_tools(asked, rendered) and rendered.tools:
        # They stay in the prompt, which earlier and later turns begin with as well; only a call may not begin.
        opener = tuple(tokenizer.encode(OPEN, control=True))
        how = dataclasses.replace(how, bad_tokens=(*how.bad_tokens, opener))
    rules = rules_of(
        tokenizer, asked.response_format, asked.structured_outputs,
        inside=bool(opens_thinking(tokens, tokenizer)),
        calls=called(asked.tool_choice, rendered.tools), offered=bool(callable_tools(asked, rendered)),
        parallel=asked.parallel_tool_calls is not False,
    )  # fmt: skip
    marks: tuple[int, ...] = ()
    if len(tokens) == len(rendered.tokens):  # else it was cut at its beginning, and no later chat begins so
        marks = stable_lengths(tokenizer, rendered.messages, rendered.tools, rendered.settings, tokens)
    return Job(tokens=tokens, sampling=how, rules=rules, tenant=tenant, priority=asked.priority, marks=marks)


def callable_tools(asked: ChatRequest, rendered: Rendered) -> Sequence[Mapping] | None:
    return None if asked.tool_choice == "none" else rendered.tools


def numbered(job: Job, number: int) -> Job:
    """The same for another answer: the next seed, and rules of its own."""
    sampling = dataclasses.replace(job.sampling, seed=(job.sampling.seed + number) % (1 << 64))
    return dataclasses.replace(job, sampling=sampling, rules=[rule.fork() for rule in job.rules])


def choice(context: Context, asked: ChatRequest, rendered: Rendered, inside: bool | None, number: int) -> ChatChoice:
    tools = callable_tools(asked, rendered)
    parser = AnswerStream(inside=inside, tools=tools, force_nonempty_content=wants_content(asked))
    wanted = Wanted(
        logprobs=bool(asked.logprobs), token_ids=bool(asked.return_token_ids),
        sources=bool(asked.return_token_sources), reasoning=asked.include_reasoning is not False,
        several=asked.parallel_tool_calls is not False,
    )  # fmt: skip
    return ChatChoice(number, wanted, context.tokenizer, parser)


def following(context: Context, rendered: Rendered, job: Job, choices: Sequence[ChatChoice]) -> Job | None:
    """A job to be read in idle time: the beginning of the next turn, which renders this answer as history."""
    if len(choices) > 1:
        return None  # which of them the client keeps is not known
    try:
        tokens = following_turn(
            context.tokenizer, [*rendered.messages, choices[0].message()], rendered.tools, rendered.settings
        )
    except UserError as bad:
        log.debug("the answer cannot be rendered as history: %s", bad)
        return None
    if not 0 < len(tokens) < context.engine.max_tokens:
        return None
    return Job(
        tokens=tokens, sampling=dataclasses.replace(context.sampling, max_tokens=1), tenant=job.tenant,
        marks=(len(tokens),),
    )  # fmt: skip
