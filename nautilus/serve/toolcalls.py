"""An assistant's text, in pieces, as reasoning, content and tool calls, in pieces.

A call is written in XML that has no escapes, and models leave parts of it out:

    <tool_call>
    <function=NAME>
    <parameter=NAME>
    value
    </parameter>
    </function>
    </tool_call>

What counts as markup. `</think>` and `<tool_call>` end the reasoning; one `</think>` after that is dropped.
`<function=NAME>` opens a call after `<tool_call>`, and without it where a line begins. A value that begins on a line of
its own ends where a line begins with a marker: its closer, or another one if the closer is missing. One that begins
beside its opener also ends at the first closer. One newline before and one after a value are no part of it. What was
not closed is closed by the next opener, by a closer further out or by the end. White space around calls is dropped;
all other text between markers is content. An incomplete marker is text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nautilus.serve import markers
from nautilus.serve.arguments import ArgumentText, Signatures

PORTION = 4096  # characters looked at together, so that the cost of a text grows with its length only


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallOpened:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of one call's arguments. All parts of a call, joined, are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallClosed:
    index: int


Delta = Reasoning | Content | CallOpened | Arguments | CallClosed


@dataclass(frozen=True)
class Call:
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model thought, what it said and what it called."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()


def gather(deltas: Iterable[Delta]) -> Answer:
    """The whole answer from its parts."""
    reasoning, content, calls = [], [], {}
    for delta in deltas:
        match delta:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case CallOpened(index, id, name):
                calls[index] = (id, name, [])
            case Arguments(index, text):
                calls[index][2].append(text)
    called = tuple(Call(id, name, "".join(parts)) for id, name, parts in calls.values())
    return Answer(reasoning="".join(reasoning), content="".join(content), calls=called)


def split_answer(text: str, *, inside: bool | None, tools: Sequence[Mapping] | None = None) -> Answer:
    """A whole text at once, as `AnswerStream` reads it."""
    stream = AnswerStream(inside=inside, tools=tools)
    return gather([*stream.add(text), *stream.finish()])


def random_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class AnswerStream:
    """Splits an assistant's text into reasoning, content and tool calls, and releases as much as is certain.

    How the text is cut into pieces changes nothing but how the parts are cut.

    inside: the text begins within a thinking block (see `opens_thinking`); without a closing tag all of it is reasoning
    then. A text that opens such a block itself is read in the same way. None: plain text, all of it content.
    tools: what the model may call, as a request lists it: for the types of the parameters. A call of another function
    is passed on. None: no calls are looked for, their markup is text.
    force_nonempty_content: where nothing is said before the first call, or at all, what was thought counts as said.
    Reasoning is held back then until one or the other is certain.
    new_id: gives every call its id.

    A parameter that is given twice stands in the JSON twice; common readers take the last one. What `inside` says
    afterwards: whether the text is reasoning at the moment.
    """

    def __init__(
        self,
        *,
        inside: bool | None,
        tools: Sequence[Mapping] | None = None,
        force_nonempty_content: bool = False,
        new_id: Callable[[], str] = random_id,
    ):
        self.signatures, self.new_id = None if tools is None else Signatures(tools), new_id
        self.inside, self.plain, self.start = bool(inside), inside is None, inside is not None
        self.place = self.thinking_place if inside else self.content_place
        self.buffer = ""
        self.out: list[Delta] = []
        self.trim = False  # newlines that come now belong to no side
        self.late = False  # the reasoning is over, one more closing tag is dropped
        self.fresh = True  # nothing was said since the last marker
        self.called = False  # and that marker was one of a call
        self.thoughts: list[str] | None = [] if force_nonempty_content else None
        self.index, self.name, self.first = -1, "", True
        self.value: ArgumentText | None = None
        self.value_begun = False

    @property
    def thinking_place(self) -> markers.Place:
        return markers.PLAIN if self.signatures is None else markers.THINKING

    @property
    def content_place(self) -> markers.Place:
        return markers.PLAIN if self.signatures is None else markers.CONTENT

    @property
    def held(self) -> int | None:
        """How many of the last characters may still be told; None: all of them since the last that were."""
        return None if self.thoughts else len(self.buffer)

    def add(self, text: str) -> list[Delta]:
        for begin in range(0, len(text), PORTION):
            self.buffer += text[begin : begin + PORTION]
            self.read(final=False)
        return self.released()

    def finish(self) -> list[Delta]:
        """What was held back, once no more text can come."""
        self.read(final=True)
        self.close_call()
        self.settle(Content)
        return self.released()

    def released(self) -> list[Delta]:
        out, self.out = self.out, []
        return out

    def read(self, *, final: bool) -> None:
        if self.plain:
            self.say_content(self.buffer)
            self.buffer = ""
            return
        if self.start and not self.knows_start(final):
            return
        while self.read_value(self.value, final) if self.value else self.read_text(final):
            pass

    def knows_start(self, final: bool) -> bool:
        """Whether it is certain if the text opens a thinking block itself. If it does, from here on it is inside."""
        text = self.buffer.lstrip("\n")
        opens = text.startswith(markers.THINK)
        if opens:
            self.buffer, self.inside, self.trim = text.removeprefix(markers.THINK), True, True
            self.place = self.thinking_place
        self.start = not (opens or final) and markers.THINK.startswith(text)
        return not self.start

    def read_text(self, final: bool) -> bool:
        """All up to the next marker, and that; without one, what is certain. Returns whether there was one."""
        if self.trim:
            self.buffer = self.buffer.lstrip("\n")
            self.trim = not self.buffer
        if found := self.next_marker():
            text, self.buffer = self.buffer[: found.start()], self.buffer[found.end() :]
            self.take(*markers.split_marker(found[0]), text)
            return True
        certain = len(self.buffer) if final else self.certain()
        text, self.buffer = self.buffer[:certain], self.buffer[certain:]
        self.say_thought(text) if self.inside else self.say_content(text)
        return False

    def next_marker(self) -> re.Match | None:
        begin = 0
        while found := self.place.marker.search(self.buffer, begin):
            if self.counts(found):
                return found
            begin = found.start() + 1
        return None

    def counts(self, found: re.Match) -> bool:
        if found[0] == markers.THOUGHT:
            return self.inside or self.late
        if self.place is not markers.CONTENT or found[0] == markers.OPEN:
            return True
        before = self.buffer[: found.start()].rstrip(" \t")
        return before.endswith("\n") or (self.fresh and not before)

    def certain(self) -> int:
        """How much is text whatever comes, without the white space that a marker could still swallow."""
        text = self.buffer[: self.place.held(self.buffer)]
        return len(text.rstrip("\n") if self.inside else text if self.signatures is None else text.rstrip())

    def take(self, marker: str, name: str, text: str) -> None:
        """One marker, and the text before it."""
        if self.inside:
            self.say_thought(text)
            self.inside, self.place = False, self.content_place
            self.late, self.fresh, self.trim = True, True, marker == markers.THOUGHT
        elif marker == markers.THOUGHT:
            said = text if self.signatures is None else text.rstrip()
            self.say_content(said)
            self.buffer = text[len(said) :] + self.buffer
            self.late, self.trim = False, self.fresh
        else:
            self.say_content(text.rstrip())
        if marker != markers.THOUGHT:
            self.move(marker, name)

    def move(self, marker: str, name: str) -> None:
        """To where a marker of a call leads."""
        self.fresh = self.called = True
        if marker == markers.PARAMETER:
            self.open_value(name)
        elif marker != markers.END_PARAMETER:
            self.close_call()
            if marker == markers.FUNCTION:
                self.open_call(name)
            places = {markers.FUNCTION: markers.BODY, markers.CLOSE: markers.CONTENT}
            self.place = places.get(marker, markers.WRAPPED)

    def open_call(self, name: str) -> None:
        self.settle(Content)
        self.index, self.name, self.first = self.index + 1, name, True
        self.out.append(CallOpened(self.index, self.new_id(), name))

    def close_call(self) -> None:
        if self.name:
            self.say(Arguments(self.index, "{}" if self.first else "}"))
            self.out.append(CallClosed(self.index))
            self.name = ""

    def open_value(self, name: str) -> None:
        assert self.signatures is not None
        self.value, self.value_begun = ArgumentText(self.signatures.types(self.name, name)), False
        self.say(Arguments(self.index, f"{'{' if self.first else ', '}{json.dumps(name, ensure_ascii=False)}: "))
        self.first = False

    def read_value(self, value: ArgumentText, final: bool) -> bool:
        """As much of a value as is certain. Returns whether it ended."""
        if not self.value_begun:
            self.place = markers.VALUE if self.buffer.startswith("\n") else markers.VALUE_BESIDE
        found = self.place.marker.search(self.buffer)
        end = found.end() if found else len(self.buffer) if final else self.place.held(self.buffer)
        text, self.buffer = self.buffer[:end], self.buffer[end:]
        if found and found[0].endswith(">"):
            text = text[: found.start()]
        elif found or final:
            text = markers.without_closers(text)
        if text and not self.value_begun:
            self.value_begun, text = True, text.removeprefix("\n")
        self.say(Arguments(self.index, value.add(text)))
        if found or final:
            self.say(Arguments(self.index, value.finish()))
            self.value, self.place = None, markers.BODY
        return found is not None

    def say_thought(self, text: str) -> None:
        text = text.rstrip("\n")
        if self.thoughts is None:
            self.say(Reasoning(text))
        else:
            self.thoughts.append(text)

    def say_content(self, text: str) -> None:
        blank = not text.strip()
        if not text or (blank and self.called):
            return
        if not blank:
            self.settle(Reasoning)
        self.fresh = self.called = False
        self.say(Content(text))

    def settle(self, kind: type[Reasoning] | type[Content]) -> None:
        """What was held back of the reasoning is of this kind."""
        thoughts, self.thoughts = self.thoughts or [], None
        self.say(kind("".join(thoughts)))

    def say(self, delta: Reasoning | Content | Arguments) -> None:
        """Release a text, together with what was released before it if that is of the same kind."""
        if not delta.text:
            return
        last = self.out[-1] if self.out else None
        if isinstance(last, Reasoning | Content | Arguments) and type(last) is type(delta):
            self.out[-1] = replace(delta, text=last.text + delta.text)
        else:
            self.out.append(delta)
