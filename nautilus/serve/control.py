"""From generated text to what a reader sees: no stop strings, reasoning apart from content.

Everything here takes a growing text in pieces and releases as much as is certain; how the text was cut into pieces
never changes what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OPEN, CLOSE = "<think>\n", "</think>"


class StopStrings:
    """Releases text until a stop string is complete, then nothing more; never a part of one.

    The stop string that is complete first ends the text; of two that end at the same character, the longer one counts.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings, self.held, self.hit = strings, "", False

    def add(self, text: str) -> str:
        if self.hit:
            return ""
        text = self.held + text
        found = [(text.find(string) + len(string), -len(string)) for string in self.strings if string in text]
        if found:
            end, length = min(found)
            self.held, self.hit = "", True
            return text[: end + length]
        certain = len(text) - begun(text, self.strings)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, once no more text can come."""
        held, self.held = self.held, ""
        return held


def begun(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of the strings begins, without being complete."""
    lengths = (length for string in strings for length in range(1, len(string)) if text.endswith(string[:length]))
    return max(lengths, default=0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model thought and what it said; as a result of `Thinking`, the new parts of both."""

    reasoning: str = ""
    content: str = ""

    def __add__(self, more: Answer) -> Answer:
        return Answer(reasoning=self.reasoning + more.reasoning, content=self.content + more.content)


class Thinking:
    """Splits an assistant's text at `</think>`. Newlines right before and right after it belong to neither side.

    inside: the text begins within a thinking block, as it does when the prompt ends with `<think>` and a newline; then
    without a closing tag all of it is reasoning. Otherwise all of it is content.
    """

    def __init__(self, *, inside: bool):
        self.inside, self.held, self.begin = inside, "", False

    def add(self, text: str) -> Answer:
        if not self.inside:
            return Answer(content=self.content(text))
        text = self.held + text
        if CLOSE in text:
            reasoning, _, rest = text.partition(CLOSE)
            self.inside, self.begin, self.held = False, True, ""
            return Answer(reasoning=reasoning.rstrip("\n"), content=self.content(rest))
        certain = text[: len(text) - begun(text, [CLOSE])].rstrip("\n")
        self.held = text[len(certain) :]
        return Answer(reasoning=certain)

    def content(self, text: str) -> str:
        text = text.lstrip("\n") if self.begin else text
        self.begin = self.begin and not text
        return text

    def finish(self) -> Answer:
        held, self.held = self.held, ""
        return Answer(reasoning=held.rstrip("\n"))


def split_answer(text: str, *, inside: bool) -> Answer:
    """The same for a whole text at once."""
    thinking = Thinking(inside=inside)
    return thinking.add(text) + thinking.finish()


def opens_thinking(prompt: str) -> bool:
    """Whether an answer to this rendered prompt begins within a thinking block."""
    return prompt.endswith(OPEN)
