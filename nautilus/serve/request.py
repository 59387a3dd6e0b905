"""One answer on its way: what was asked, what has come so far, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nautilus.data.tokenizer import TextStream
from nautilus.serve.control import StopStrings
from nautilus.serve.forward import Part
from nautilus.serve.memory import Berth
from nautilus.serve.rules import Rule
from nautilus.serve.sample import Drawn
from nautilus.serve.sampling import Sampling
from nautilus.serve.scores import PromptScores


class Piece(NamedTuple):
    """One generated token and the text that became certain with it.

    finish_reason is None until the last piece: "stop" (a stop token, a stop string, or a rule that allows nothing
    more), "length", "cancelled" or "error". `top` has the most probable tokens and their log-probs, where asked for.
    A piece that tells of an end without a token has token -1. `stop` is the stop string that ended the text. `prompt`
    has the log-probs of the prompt's tokens, on the first piece of an answer to which they were asked for. `source`:
    "plain", or which kind of draft had foretold the token, as `nautilus.serve.draft.proposal.SOURCES` names them.
    `version`: how often the engine's weights had changed before.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None = None
    top: tuple[tuple[int, float], ...] = ()
    stop: str | None = None
    prompt: tuple[Drawn, ...] = ()
    source: str = "plain"
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer. `tokens` and `logprobs` include the token that ended it, `text` does not. `cached`: tokens of the
    prompt that did not have to be read."""

    prompt: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    cached: int = 0


@dataclass(kw_only=True, eq=False)
class Request:
    """`tokens` is the prompt and grows. tenant: whose prefixes it may share; priority: lower runs first; marks: lengths
    of the prompt after which its state is worth keeping; kept: so is that at the end; warm: the prompt is read for
    these alone, not answered; scores: the log-probs of the prompt, where they are asked for; answer: False, if it is
    read for those alone."""

    prompt: int
    tokens: list[int]
    sampling: Sampling
    ends: frozenset[int]
    limit: int
    written: TextStream
    stops: StopStrings
    rules: Sequence[Rule] = ()
    tenant: str = ""
    priority: int = 0
    marks: Sequence[int] = ()
    kept: bool = True
    warm: bool = False
    scores: PromptScores | None = None
    answer: bool = True
    pieces: list[Piece] = field(default_factory=list)
    berth: Berth | None = None
    cached: int = 0
    drafted: int = 0  # tokens of drafts that were tried for it
    apart: bool = False  # a call for several failed, and this was one of them: from then on it has its own
    error: Exception | None = None  # what it ended with: UserError for one of its own, RuntimeError for the engine's
    arrived: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> bool:
        return bool(self.pieces) and self.pieces[-1].finish_reason is not None

    @property
    def unread(self) -> int:
        """Tokens that the model has still to read before the next one can be drawn."""
        return len(self.tokens) - (self.berth.length if self.berth else 0)

    @property
    def unscored(self) -> bool:
        """The prompt must be read from its beginning, for log-probs that are not known."""
        return self.scores is not None and not self.scores.complete

    @property
    def answered(self) -> bool:
        """A token follows its prompt."""
        return self.answer and not self.warm

    def part(self, size: int) -> Part:
        """The next so many tokens of its prompt, as a call reads them."""
        assert self.berth is not None
        at, watch = self.berth.length, self.scores.add if self.scores and self.unscored else None
        last = at + size == len(self.tokens) and self.answered
        return Part(tokens=self.tokens[at : at + size], berth=self.berth, last=last, watch=watch)

    @property
    def lonely(self) -> bool:
        """Its prompt is read in calls of its own."""
        return self.apart or self.unscored

    @property
    def reading(self) -> bool:
        """More than one token is unread, or the last one of a prompt is, which is read in calls of its own."""
        return self.unread > 1 or not self.answered or (self.berth is not None and self.berth.awake is not None)

    def take(self, drawn: Drawn, *, source: str, version: int) -> Piece:
        """Add a token; what it means for the text and for the end of the request."""
        token, logprob, top = drawn
        self.tokens.append(token)
        for rule in self.rules:
            rule.add(token)
        ended, full = token in self.ends, len(self.tokens) >= self.limit
        text = "" if ended else self.written.push(token)
        ended = ended or any([rule.ended for rule in self.rules])
        if len(self.tokens) - self.prompt > self.sampling.min_tokens:  # before, no string ends an answer
            text = self.stops.add(text)
        if ended or full:
            text += self.stops.add(self.written.close()) + self.stops.finish()
        stop = self.stops.hit
        reason = "stop" if ended or stop else "length" if full else None
        return self.add(Piece(text, token, logprob, reason, top, stop, source=source, version=version))

    def end(self, reason: str) -> Piece:
        """Without a further token; what was held back is written, but not after an error, which may be of the text."""
        text = "" if self.stops.hit or reason == "error" else self.stops.add(self.written.close()) + self.stops.finish()
        return self.add(Piece(text=text, token=-1, logprob=0.0, finish_reason=reason))

    def add(self, piece: Piece) -> Piece:
        if self.scores is not None and not self.pieces:
            piece = piece._replace(prompt=tuple(self.scores.found))
        self.pieces.append(piece)
        return piece

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def completion(self) -> Completion:
        drawn = [piece for piece in self.pieces if piece.token >= 0]
        return Completion(
            prompt=tuple(self.tokens[: self.prompt]),
            text="".join(piece.text for piece in self.pieces),
            tokens=tuple(piece.token for piece in drawn),
            logprobs=tuple(piece.logprob for piece in drawn),
            finish_reason=self.pieces[-1].finish_reason or "",
            cached=self.cached,
        )
