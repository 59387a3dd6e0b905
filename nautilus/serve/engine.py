"""Generation: prompts in, tokens with their log-probs and text out. Letters: B requests, T tokens, V vocabulary.

Requests begin as soon as there is room for them: a prompt is read in chunks, then every step adds one token to each
running request. What a step of so many requests does is recorded the first time and replayed from then on, where all of
it is native.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from nautilus.config.keys import short
from nautilus.data.chat import chat_tokens
from nautilus.data.tokenizer import TextStream, Tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.tape import CannotRecord, Tape, record
from nautilus.ops.linear import Packs, packed_once
from nautilus.ops.state_format import StateFormat
from nautilus.runtime import UserError
from nautilus.serve.control import StopStrings
from nautilus.serve.memory import Berth, Berths, point, write
from nautilus.serve.sample import Sampling, draw, whole

log = logging.getLogger("nautilus.serve")
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
    """Answers of a model to prompts; a prompt is text to continue, a list of token ids, or messages of a chat.

        engine = nautilus.Engine(*nautilus.load("runs/demo"), max_tokens=512)
        first, second = engine.generate(["Return the", "def f("], Sampling(max_tokens=20))   each a Completion
        for piece in engine.stream([{"role": "user", "content": "Hello"}]):                  a Piece for every token
            print(piece.text, end="")

    `Sampling`, of `nautilus.serve`, says how tokens are chosen and when an answer ends.

    model, tokenizer: as `nautilus.load` gives them; it computes where its weights are. A model in training may be asked
        too, and is handed back as it was.
    max_tokens: most tokens of a request, prompt and answer together, from 2 to the positions of the model's config;
        None, the default: as many as these.
    rows: most requests that run together (32 by default); others wait for their turn. A state is kept for each.
    chunk: most tokens of a prompt that are read at a time (512 by default); more of them take more memory.
    cache: the format of keys and values, "bf16", "fp8", "int8" or "f32"; "": as the activations. There is room for
        rows x max_tokens of them, but in no more than a quarter of the machine's memory, unless one request takes more.
    state: how recurrent states are stored between tokens: "fp32", exact, or a narrower format by its name in
        `nautilus.ops.state_format`, such as "fp16_sr". A state is rounded after the prompt, then after every token.
    state_seed: of the random bits of formats that round stochastically, such as that one; 0 by default.

    `rows` and `chunk` bound memory and do not change results beyond rounding; on native kernels they change no bit.
    UserError for a max_tokens, rows, chunk, cache or state that cannot be, and where there is no memory for them.
    """

    def __init__(
        self, model: Language, tokenizer: Tokenizer, *, max_tokens: int | None = None, rows: int = 32, chunk: int = 512,
        cache: str = "", state: str = "fp32", state_seed: int = 0,
    ):  # fmt: skip
        positions = model.config.positions
        self.max_tokens = positions if max_tokens is None else max_tokens
        if not whole(self.max_tokens) or not 1 < self.max_tokens <= positions:
            raise UserError(
                f"an engine of max_tokens={self.max_tokens} was asked for; the model has positions={positions}: "
                f"choose from 2 to {positions}"
            )
        if not whole(rows) or not whole(chunk) or rows < 1 or chunk < 1:
            raise UserError(
                f"an engine of rows={rows} and chunk={chunk} was asked for; both must be whole numbers from 1"
            )
        self.model, self.tokenizer, self.rows, self.chunk = model, tokenizer, rows, chunk
        stored = StateFormat(name=state, seed=state_seed)
        self.berths = Berths(model, rows=rows, max_tokens=self.max_tokens, cache=cache, state=stored)
        self.packs: Packs = {}
        self.steps: dict[int, Step] = {}

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Iterator[Piece]:
        """The answer to one prompt, token by token. A prompt is messages, tokens, or text to continue."""
        request = self.request(prompt, sampling)  # outside the generator: bad input is an error here and now
        return (piece for _, piece in self.run([request]))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Completion]:
        """The answers to several prompts, in their order. Each gets the tokens that it would get alone."""
        if isinstance(prompts, str | Mapping | None):
            raise UserError(
                f"answers to {short(prompts)} were asked for; give a list of prompts, or use stream for one"
            )
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if len(samplings) != len(prompts):
            raise UserError(
                f"answers to {len(prompts)} prompts were asked for with {len(samplings)} samplings; give one sampling "
                "for all prompts or one for each"
            )
        requests = [self.request(*pair) for pair in zip(prompts, samplings, strict=True)]
        for _ in self.run(requests):
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
            # It begins with a start token in Llama's file, with nothing in Nemotron's.
            return self.tokenizer.core.encode("").ids + self.tokenizer.encode(prompt)
        try:
            if isinstance(prompt, Mapping | bytes):
                raise TypeError(f"it is one {type(prompt).__name__}")
            parts = [*prompt]
            if not any(isinstance(part, Mapping) for part in parts):
                return [operator.index(token) for token in cast(list[int], parts)]
            if strange := [part for part in parts if not isinstance(part, Mapping)]:
                raise TypeError(f"{short(strange[0])} stands among its messages")
        except TypeError as bad:
            raise UserError(
                f"an answer to the prompt {short(prompt)} was asked for, but {bad}; give text, messages or token ids"
            ) from bad
        return chat_tokens(self.tokenizer, cast(list[Mapping], parts))

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
        """All requests until the last is finished. They begin in their order, as soon as others have left room."""
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self.forget()  # the weights may have changed since the last run, but do not during one
        waiting, running = deque(requests), dict[int, tuple[Request, Berth]]()
        try:
            while waiting or running:
                while waiting and (berth := self.berths.take(waiting[0].limit)) is not None:
                    request = waiting.popleft()
                    running[berth.slot] = request, berth
                    yield from self.accept([request], self.prefill(request.tokens, berth))
                if waiting and not running:  # nobody here will leave room
                    raise UserError(
                        f"{len(waiting)} answers were asked for, but streams that nobody reads on fill the engine of"
                        f" rows={self.rows} and max_tokens={self.max_tokens}; read or close them, or give more rows"
                    )
                for slot in [slot for slot, (request, _) in running.items() if request.finished]:
                    self.berths.give_back(running.pop(slot)[1])
                if running:
                    active = list(running.values())
                    yield from self.accept([request for request, _ in active], self.step(active))
        finally:
            for _, berth in running.values():
                self.berths.give_back(berth)

    def accept(self, requests: list[Request], logits_BV: Tensor) -> Iterator[tuple[Request, Piece]]:
        positions = [len(request.tokens) for request in requests]
        drawn = draw(logits_BV, [request.sampling for request in requests], positions)
        for request, (token, logprob) in zip(requests, drawn, strict=True):
            yield request, request.take(token, logprob)

    def forget(self) -> None:
        """What was packed and recorded of the weights."""
        self.packs.clear()
        self.steps.clear()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A model in training is in evaluation mode inside; matrices are packed once."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with packed_once(self.packs):
                yield
        finally:
            if training:
                self.model.train()

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], berth: Berth) -> Tensor:
        """The logits (1, V) after these tokens, which the berth then holds."""
        lanes = self.berths.waking(berth)
        with self.computing():
            for low in range(0, len(tokens), self.chunk):
                part_BT = torch.tensor([tokens[low : low + self.chunk]], device=self.berths.device)
                point(lanes, [berth], part_BT.shape[1])
                hidden_BTD, _ = self.model.hidden(part_BT, state=lanes)
                berth.length += part_BT.shape[1]
            self.berths.rest(berth, lanes)
            return self.model.head(hidden_BTD[:, -1:])[:, 0]

    @torch.inference_mode()
    def step(self, active: list[tuple[Request, Berth]]) -> Tensor:
        """The logits (B, V) after the last token of each request."""
        berths = [berth for _, berth in active]
        if len(active) not in self.steps:
            self.steps[len(active)] = Step(self, len(active))
        step = self.steps[len(active)]
        if berths == step.berths:
            write(step.lanes.rows.length, [berth.length + 1 for berth in berths])
        else:
            write(step.lanes.slot_B, [berth.slot for berth in berths])
            point(step.lanes, berths, 1)
            step.berths = berths
        write(step.tokens_BT, [request.tokens[-1:] for request, _ in active])
        logits_BV = step.run()
        for berth in berths:
            berth.length += 1
        return logits_BV


class Step:
    """One more token for so many rows. The first run computes, the second is recorded, later ones are replays."""

    def __init__(self, engine: Engine, rows: int):
        self.engine, self.lanes = engine, engine.berths.lanes(rows)
        self.berths: list[Berth] = []  # that it was told of last
        self.tokens_BT = torch.zeros(rows, 1, dtype=torch.int64, device=engine.berths.device)
        self.tape: Tape | None = None
        self.may_record = self.tokens_BT.device.type == "cpu"
        self.warm = False

    def run(self) -> Tensor:
        if self.tape is not None:
            return self.tape.replay()
        if not (self.warm and self.may_record):
            self.warm = True
            return self.compute()
        rows = self.lanes.rows
        try:
            inputs = [self.tokens_BT, self.lanes.slot_B, rows.begin, rows.length, rows.table_BL]
            self.tape = record(self.compute, inputs)
            return self.tape.result
        except CannotRecord as reason:
            log.info("steps are not replayed, because %s", reason)
            self.may_record = False
            return self.compute()

    def compute(self) -> Tensor:
        with self.engine.computing():
            hidden_BTD, _ = self.engine.model.hidden(self.tokens_BT, state=self.lanes)
            return self.engine.model.head(hidden_BTD)[:, 0]
