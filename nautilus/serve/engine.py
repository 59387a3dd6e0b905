"""Generation: prompts in, tokens with their log-probs and text out. Letters: B requests, T tokens, V vocabulary.

A batch of prompts is read in chunks, then every step adds one token to each request that is not finished. Prompts of
different lengths are padded on the left; the padding is a document of its own, so no token ever sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from nautilus.data.chat import chat_tokens
from nautilus.data.tokenizer import TextStream, Tokenizer
from nautilus.model.language import Language
from nautilus.model.state import State
from nautilus.ops.linear import Packs, packed_once
from nautilus.runtime import UserError
from nautilus.serve.control import StopStrings
from nautilus.serve.sample import Sampling, draw

Prompt = str | Sequence[int] | Sequence[Mapping]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One generated token and the text that became certain with it.

    finish_reason is None until the last piece: "stop" (a stop token or stop string) or "length".
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer. `tokens` and `logprobs` include the token that ended it, `text` does not."""

    prompt: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclass(kw_only=True)
class Request:
    """A prompt on its way to an answer; `tokens` grows."""

    prompt: int
    tokens: list[int]
    sampling: Sampling
    ends: frozenset[int]
    limit: int
    written: TextStream
    stops: StopStrings
    pieces: list[Piece] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.pieces) and self.pieces[-1].finish_reason is not None

    def take(self, token: int, logprob: float) -> Piece:
        """Add a token; what it means for the text and for the end of the request."""
        self.tokens.append(token)
        ended = token in self.ends
        text = "" if ended else self.stops.add(self.written.push(token))
        if ended or len(self.tokens) >= self.limit:
            text += self.stops.add(self.written.close()) + self.stops.finish()
        reason = "stop" if ended or self.stops.hit else "length" if len(self.tokens) >= self.limit else None
        self.pieces.append(Piece(text=text, token=token, logprob=logprob, finish_reason=reason))
        return self.pieces[-1]

    def completion(self) -> Completion:
        return Completion(
            prompt=tuple(self.tokens[: self.prompt]),
            text="".join(piece.text for piece in self.pieces),
            tokens=tuple(piece.token for piece in self.pieces),
            logprobs=tuple(piece.logprob for piece in self.pieces),
            finish_reason=self.pieces[-1].finish_reason or "",
        )


class Engine:
    """Answers of a model.

    max_tokens: most tokens of a request, prompt and answer together (None: what the model's config allows); rows: most
    requests that run together; chunk: most tokens of each prompt that are read at a time. `rows` and `chunk` bound
    memory and do not change results beyond rounding.
    """

    def __init__(
        self, model: Language, tokenizer: Tokenizer, *, max_tokens: int | None = None, rows: int = 32, chunk: int = 512
    ):
        positions = model.config.positions
        self.max_tokens = positions if max_tokens is None else max_tokens
        if not 1 < self.max_tokens <= positions:
            raise UserError(
                f"an engine of max_tokens={self.max_tokens} was asked for; the model has positions={positions}: "
                f"choose from 2 to {positions}"
            )
        if rows < 1 or chunk < 1:
            raise UserError(f"an engine of rows={rows} and chunk={chunk} was asked for; both must be at least 1")
        self.model, self.tokenizer, self.rows, self.chunk = model, tokenizer, rows, chunk
        self.packs: Packs = {}

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Iterator[Piece]:
        """The answer to one prompt, token by token. A prompt is messages, tokens, or text to continue."""
        request = self.request(prompt, sampling)  # outside the generator: bad input is an error here and now
        return (piece for _, piece in self.run([request]))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Completion]:
        """The answers to several prompts, in their order. Each gets the tokens that it would get alone."""
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if len(samplings) != len(prompts):
            raise UserError(
                f"answers to {len(prompts)} prompts were asked for with {len(samplings)} samplings; give one sampling "
                "for all prompts or one for each"
            )
        requests = [self.request(*pair) for pair in zip(prompts, samplings, strict=True)]
        by_length = sorted(requests, key=lambda request: request.prompt)
        for low in range(0, len(requests), self.rows):
            for _ in self.run(by_length[low : low + self.rows]):
                pass
        return [request.completion() for request in requests]

    def request(self, prompt: Prompt, sampling: Sampling) -> Request:
        tokens = self.checked(self.tokens(prompt))
        return Request(
            prompt=len(tokens),
            tokens=tokens,
            sampling=sampling,
            ends=frozenset((*self.model.config.eos, *self.tokenizer.stop, *sampling.stop_tokens)),
            limit=min(len(tokens) + sampling.max_tokens, self.max_tokens),
            written=self.tokenizer.stream(skip_special=True),
            stops=StopStrings(sampling.stop),
        )

    def tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of messages, by the chat template; of text, begun as its tokenizer does; tokens as they are."""
        if isinstance(prompt, str):
            begin = self.tokenizer.core.encode("").ids  # a start token in Llama's file, nothing in Nemotron's
            return begin + self.tokenizer.encode(prompt)
        messages = [part for part in prompt if isinstance(part, Mapping)]
        return (
            chat_tokens(self.tokenizer, messages) if messages else [int(token) for token in cast(Sequence[int], prompt)]
        )

    def checked(self, tokens: list[int]) -> list[int]:
        config = self.model.config
        if not tokens:
            raise UserError("an answer to a prompt of 0 tokens was asked for; give at least one")
        strange = [token for token in tokens if not 0 <= token < config.vocab]
        if strange:
            raise UserError(
                f"the prompt holds token {strange[0]}, the model knows 0 to {config.vocab - 1}; use the tokenizer that "
                "was saved with the model"
            )
        if len(tokens) >= self.max_tokens:
            raise UserError(
                f"an answer to a prompt of {len(tokens)} tokens was asked for; prompt and answer together may have "
                f"max_tokens={self.max_tokens} (the model's positions: {config.positions}); shorten the prompt"
            )
        return tokens

    def run(self, requests: list[Request]) -> Iterator[tuple[Request, Piece]]:
        """All requests, one token each per step, until the last is finished; finished ones leave the batch."""
        self.packs = {}  # the weights may have changed since the last run, but do not during one
        logits_BV, state = self.prefill(requests)
        while True:
            positions = [len(request.tokens) for request in requests]
            drawn = draw(logits_BV, [request.sampling for request in requests], positions)
            for request, (token, logprob) in zip(requests, drawn, strict=True):
                yield request, request.take(token, logprob)
            going = [row for row, request in enumerate(requests) if not request.finished]
            if not going:
                return
            if len(going) < len(requests):
                requests = [requests[row] for row in going]
                state = state.rows(torch.tensor(going, device=logits_BV.device))
            last_BT = torch.tensor([request.tokens[-1:] for request in requests])
            logits_BV, state = self.read(last_BT, state=state)

    def prefill(self, requests: list[Request]) -> tuple[Tensor, State]:
        """The logits after each prompt, and the state."""
        width = max(len(request.tokens) for request in requests)
        tokens_BT = torch.full((len(requests), width), self.model.config.pad)
        document_BT = torch.zeros_like(tokens_BT)
        for row, request in enumerate(requests):
            tokens_BT[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
            document_BT[row, width - len(request.tokens) :] = 1
        return self.read(tokens_BT, document_BT=None if document_BT.all() else document_BT)

    @torch.inference_mode()
    def read(
        self, tokens_BT: Tensor, *, state: State | None = None, document_BT: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Feed tokens, a chunk at a time; the logits after the last token of each row, and the state."""
        device, training = self.model.head_weight.device, self.model.training
        if training:
            self.model.eval()
        try:
            with packed_once(self.packs):
                for low in range(0, tokens_BT.shape[1], self.chunk):
                    part = slice(low, low + self.chunk)
                    hidden_BTD, state = self.model.hidden(
                        tokens_BT[:, part].to(device),
                        state=state,
                        document_BT=None if document_BT is None else document_BT[:, part].to(device),
                    )
                assert state is not None, "a prompt holds at least one token"
                return self.model.head(hidden_BTD[:, -1:])[:, 0], state
        finally:
            if training:
                self.model.train()
