"""Talk to a model in the terminal.

MODEL is a run, a checkpoint folder or a hub id. Into a pipe goes the answer alone, all else to stderr. Lines may
be piped in; while you talk: /reset, /seed N, /quit, and Ctrl-C to stop an answer.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.data.template import template_of
from nautilus.runtime import UserError, quiet
from nautilus.serve import AnswerStream, Engine, Sampling, opens_thinking
from nautilus.serve.sources import PLAIN, Origins, passes
from nautilus.serve.terminal import lines, write, write_legend, write_runs
from nautilus.serve.toolcalls import Delta, gather

FEWEST = 8  # tokens of an answer whose speed is told
HELP = "/reset forgets what was said, /seed N draws other answers, /quit ends, Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    prompt: str | None = setting(None, "answer this and end")
    system: str = setting("", "what the model is told before the conversation")
    thinking: bool = setting(True, "reason before answering")
    drafts: int = setting(0, "most tokens tried at once of what known text goes on with, where that is faster; 0: none")
    sources: bool = setting(False, "show which text such drafts had foretold, and in how many passes answers came")
    template: str = setting("", "how chats are written: a file, or nemotron, the family's (as the model says)")
    raw: bool = setting(False, "continue plain text; always so for a model without a chat template")
    sampling: Sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=1024)


@dataclass(kw_only=True)
class Chat:
    """What was said so far. Answers go to stdout, remarks to stderr, reasoning to stdout only if that is a terminal."""

    engine: Engine
    settings: Settings
    sampling: Sampling
    messages: list[dict] = field(default_factory=list)
    out: Console = field(default_factory=Console)
    err: Console = field(default_factory=lambda: Console(stderr=True))

    @property
    def raw(self) -> bool:
        return self.settings.raw or self.engine.tokenizer.template is None

    @property
    def aside(self) -> Console:
        return self.out if self.out.is_terminal else self.err

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.settings.system}] if self.settings.system else []


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to talk to; write nautilus chat MODEL, a run, a checkpoint folder or a hub id")
    with quiet():
        model, tokenizer = nautilus.load(settings.model)
        tokenizer.template = template_of(settings.template, tokenizer.template)
        engine = Engine(model, tokenizer, drafts=settings.drafts)
        chat = Chat(engine=engine, settings=settings, sampling=settings.sampling)
    chat.reset()
    if settings.prompt is not None:
        if chat.raw and chat.out.is_terminal:  # what is continued; a pipe gets the answer alone
            write(chat.out, settings.prompt, style="dim")
        reply(chat, settings.prompt)
        return
    remark(chat, f"{'Each line is continued as text' if chat.raw else 'Say something'}; {HELP}.")
    for line in lines():
        if line.strip() == "/quit":
            return
        try:
            command(chat, line) if line.startswith("/") else reply(chat, line)
        except UserError as bad:
            remark(chat, f"{bad}; /reset forgets what was said")


def command(chat: Chat, line: str) -> None:
    word, _, value = line.strip().partition(" ")
    if word == "/reset":
        chat.reset()
        remark(chat, "forgotten")
    elif word == "/seed" and value.isdecimal() and int(value) < 1 << 64:
        chat.sampling = replace(chat.sampling, seed=int(value))
        remark(chat, f"seed {value}")
    else:
        remark(chat, f"{line.strip()!r} is no command; {HELP}")


@quiet()
def reply(chat: Chat, text: str) -> None:
    """Answer, token by token. What was written before a Ctrl-C counts as said; a prompt that is refused does not."""
    engine, asked = chat.engine, [*chat.messages, {"role": "user", "content": text}]
    how = ChatSettings(enable_thinking=chat.settings.thinking)
    tokens = engine.tokens(text) if chat.raw else chat_tokens(engine.tokenizer, asked, settings=how)
    answer = AnswerStream(inside=None if chat.raw else bool(opens_thinking(tokens, engine.tokenizer)))
    said: list[Delta] = []
    origins, sources = Origins(), []
    pieces, times = engine.stream(tokens, chat.sampling), [time.monotonic()]
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            times.append(time.monotonic())
            sources.append(piece.source)
            inside, parts = answer.inside, answer.add(piece.text)
            origins.read(piece, parts, answer.held)
            said += parts
            show(chat, parts, origins, "\n\n" if inside and not answer.inside else "")
    rest = answer.finish()
    origins.finish(rest)
    said += rest
    show(chat, rest, origins)
    write(chat.out, "\n")
    if chat.settings.sources and sources:
        write_legend(chat.err, sources)
    remark(chat, speed(times, passes(sources) if chat.settings.sources else 0))
    if not chat.raw:
        whole = gather(said)
        chat.messages = [*asked, {"role": "assistant", "reasoning": whole.reasoning, "content": whole.content}]


def show(chat: Chat, parts: list[Delta], origins: Origins, gap: str = "") -> None:
    part = gather(parts)
    for console, text, style in ((chat.aside, part.reasoning, "dim"), (chat.out, part.content, "")):
        runs = origins.take(len(text))
        write_runs(console, text, runs if chat.settings.sources else [[PLAIN, 0, len(text)]], style)
        if style:
            write(console, gap)


def remark(chat: Chat, text: str) -> None:
    write(chat.err, text + "\n", style="dim")


def speed(times: list[float], number: int = 0) -> str:
    """times: when the question was asked, then when each token came; number: of passes, where it is to be told."""
    if len(times) < 2:
        return "stopped before the first token"
    count, first = len(times) - 1, times[1] - times[0]
    # The first two steps of an engine are computed and recorded, which later ones are not: theirs is no speed.
    rate = f", then {(count - 3) / (times[-1] - times[3]):.1f} tokens/s" if count >= FEWEST else ""
    among = f" in {number} pass{'' if number == 1 else 'es'}" if number else ""
    return f"{count} token{'' if count == 1 else 's'}{among}, the first after {first:.2f} s{rate}"
