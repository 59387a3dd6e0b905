"""An answer as a row of blocks: reasoning, text, and calls, each of which begins, grows and ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from nautilus.serve.toolcalls import Arguments, CallClosed, CallOpened, Content, Delta, Reasoning


@dataclass
class Block:
    """text: of a call, its arguments as JSON; id and name: of a call only. done: nothing more comes."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    id: str = ""
    name: str = ""
    text: str = ""
    done: bool = False


@dataclass(frozen=True)
class Step:
    what: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""  # by which it grows


@dataclass
class Blocks:
    """`all` has those that there are. Each ends before the next one begins: text that is found within a call comes
    after it."""

    all: list[Block] = field(default_factory=list)
    calling: bool = False
    held: list[Delta] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> Iterator[Step]:
        for delta in deltas:
            match delta:
                case Reasoning() | Content() if self.calling:
                    self.held.append(delta)
                case Reasoning(text):
                    yield from self.grow("reasoning", text)
                case Content(text):
                    yield from self.grow("text", text)
                case CallOpened(_, id, name):
                    self.calling = True
                    yield from self.begin(Block("call", len(self.all), id, name))
                case Arguments(_, text):
                    yield from self.grow("call", text)
                case CallClosed():
                    yield from self.end()
                    self.calling, held, self.held = False, self.held, []
                    yield from self.add(held)

    def end(self) -> Iterator[Step]:
        if self.all and not self.all[-1].done:
            self.all[-1].done = True
            yield Step("end", self.all[-1])

    def begin(self, block: Block) -> Iterator[Step]:
        yield from self.end()
        self.all.append(block)
        yield Step("begin", block)

    def grow(self, kind: Literal["reasoning", "text", "call"], text: str) -> Iterator[Step]:
        if not self.all or self.all[-1].done or self.all[-1].kind != kind:
            yield from self.begin(Block(kind, len(self.all)))
        self.all[-1].text += text
        yield Step("grow", self.all[-1], text)
