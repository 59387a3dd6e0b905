"""POST /v1/completions: text or token ids to be continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.api import logprobs
from nautilus.serve.api.body import at_most
from nautilus.serve.api.chunks import Chunks
from nautilus.serve.api.constraints import ResponseFormat, StructuredOutputs, rules_of
from nautilus.serve.api.context import Context, Prepared, fitted
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.fields import Asked, check_sizes, known_tokens, read, sampling_of
from nautilus.serve.job import Job
from nautilus.serve.request import Piece
from nautilus.serve.sources import runs_of

LONGEST = 16  # tokens of an answer where none are asked for, as OpenAI has it


class CompletionRequest(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


@dataclass
class TextChoice:
    """Pieces of one answer as text. `before`: what is echoed; where log-probs are asked for, it comes with those of its
    tokens, when they are known."""

    index: int
    asked: CompletionRequest
    tokenizer: Tokenizer
    prompt: Sequence[int]
    before: str = ""
    finish_reason: str | None = None
    generated: int = 0
    reasoned: int = 0
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self):
        self.scored = bool(self.asked.echo) and self.asked.logprobs is not None
        self.length = 0

    def open(self) -> list[dict]:
        more = {"prompt_token_ids": [*self.prompt]} if self.asked.return_token_ids else {}
        before = "" if self.scored else self.before
        self.length = len(before)
        return [{**self.part(before, []), **more}] if before or more else []

    def add(self, pieces: Sequence[Piece]) -> list[dict]:
        first, drawn = not self.pieces, sum(piece.token >= 0 for piece in pieces)
        text = "".join(piece.text for piece in pieces)
        self.generated += drawn
        self.pieces += pieces
        self.finish_reason = pieces[-1].finish_reason if pieces else None
        if first and self.scored:
            text = self.before + text
        part = self.part(text, pieces, self.echoed() if first else ())
        self.length += len(text)
        return [part] if text or drawn or self.finish_reason else []

    def part(self, text: str, pieces: Sequence[Piece], echoed: Sequence[Piece] = ()) -> dict:
        told, drawn = None, [piece for piece in pieces if piece.token >= 0]
        if self.asked.logprobs is not None and (drawn or echoed):
            told = logprobs.of_text([*echoed, *drawn], self.tokenizer, self.length)
        ids = {"token_ids": [piece.token for piece in drawn]} if self.asked.return_token_ids else {}
        came = {"nautilus": {"sources": runs_of(pieces)}} if self.asked.return_token_sources and pieces else {}
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": self.finish_reason, **ids, **came}

    def echoed(self) -> list[Piece]:
        """The tokens of the prompt as pieces, where their log-probs were asked for."""
        written, found = self.tokenizer.stream(skip_special=True), self.pieces[0].prompt if self.pieces else ()
        return [Piece(text=written.push(one.token), token=one.token, logprob=one.logprob, top=one.top) for one in found]

    def whole(self) -> dict:
        echoed = self.echoed()
        self.length = 0 if echoed else len(self.before)
        text = self.before + "".join(piece.text for piece in self.pieces)
        whole = self.part(text, self.pieces, echoed)
        return {**whole, "prompt_token_ids": [*self.prompt]} if self.asked.return_token_ids else whole


def prepare(context: Context, body: Mapping[str, Any], owner: str) -> Prepared:
    """The jobs of a request. ApiError and UserError for what cannot be done."""
    asked = read(CompletionRequest, body)
    context.check_model(asked.model)
    check_sizes(asked, context.limits)
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens is 0: nothing to answer; ask for 1 or more, or for echo", param="max_tokens")
    rules = rules_of(context.tokenizer, asked.response_format, asked.structured_outputs)
    jobs, choices = [], []
    for prompt in prompts_of(context, asked):
        # Without an answer there is room for a token all the same: a sampling has one at least.
        tokens, longest = fitted(
            context, prompt, asked, 1 if asked.max_tokens == 0 else asked.max_tokens, default=LONGEST
        )
        how = sampling_of(asked, context.sampling, context.tokenizer, longest=longest, tops=asked.logprobs or 0)
        before = context.tokenizer.decode(tokens, skip_special=True) if asked.echo else ""
        job = Job(
            tokens=tokens,
            sampling=how,
            tenant=context.tenant(owner, asked.cache_salt),
            priority=asked.priority,
            prompt_logprobs=asked.logprobs if asked.echo else None,
            answer=asked.max_tokens != 0,
        )
        for number in range(asked.n or 1):
            sampling = dataclasses.replace(how, seed=(how.seed + number) % (1 << 64))
            jobs.append(dataclasses.replace(job, sampling=sampling, rules=[rule.fork() for rule in rules]))
            choices.append(TextChoice(len(choices), asked, context.tokenizer, tokens, before))
    form = Chunks(asked, name="text_completion", chunk_name="text_completion", prefix="cmpl-")
    return Prepared(asked=asked, jobs=jobs, choices=choices, form=form)


def prompts_of(context: Context, asked: CompletionRequest) -> list[list[int]]:
    """The tokens of each prompt; text is begun as its tokenizer does."""
    prompt: Any = asked.prompt
    if not isinstance(prompt, str) and not prompt:
        raise ApiError(400, "prompt is an empty list; send text or token ids", param="prompt")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    at_most(context.limits.prompts, len(prompts) * (asked.n or 1), "prompt")
    return [
        context.engine.tokens(one) if isinstance(one, str) else [*known_tokens(one, context.tokenizer, "prompt")]
        for one in prompts
    ]
