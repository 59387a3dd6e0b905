"""The markers in an assistant's text, whole ones and ones that have begun, by the place where they count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

THINK, THOUGHT, OPEN, CLOSE = "<think>", "</think>", "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER = "<function=", "</function>", "<parameter=", "</parameter>"
LONGEST_NAME = 256  # a function or parameter with a longer one is text
LONGEST_END = LONGEST_NAME + 160  # no end of a text that could still become a marker is longer


def whole(markers: Sequence[str]) -> str:
    """A pattern of complete markers. A name ends at the first `>`, and does not go on in the next line."""
    return "|".join(f"{marker}[^>\\n]{{1,{LONGEST_NAME}}}>" if marker.endswith("=") else marker for marker in markers)


def begun(markers: Sequence[str]) -> str:
    """A pattern of all with which one of the markers may begin, without being complete."""
    return "|".join(map(begun_marker, markers))


def begun_marker(marker: str) -> str:
    pattern = f"[^>\\n]{{0,{LONGEST_NAME}}}" if marker.endswith("=") else ""
    for char in reversed(marker if pattern else marker[:-1]):
        pattern = f"{char}(?:{pattern})?" if pattern else char
    return pattern


@dataclass(frozen=True)
class Place:
    """Where in the structure a text is: which markers count there, and what may still become one."""

    marker: re.Pattern
    begun: re.Pattern

    @classmethod
    def of(cls, *markers: str) -> Place:
        return cls(re.compile(whole(markers)), re.compile(f"(?:{begun(markers)})\\Z"))

    def held(self, text: str) -> int:
        """Where the end of the text begins that may still become a marker."""
        found = self.begun.search(text, max(0, len(text) - LONGEST_END))
        return found.start() if found else len(text)


CALLS = (OPEN, CLOSE, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
PLAIN = Place.of(THOUGHT)
THINKING = Place.of(THOUGHT, OPEN)
CONTENT = Place.of(THOUGHT, OPEN, FUNCTION)
WRAPPED = Place.of(THOUGHT, OPEN, CLOSE, FUNCTION, END_FUNCTION, END_PARAMETER)
BODY = Place.of(THOUGHT, *CALLS)

# A value ends where a line begins with a marker. Where that is not its own closer, closers that stand at the end of the
# value's last line are markup too, and they are held with what may follow them.
_CLOSER = r"(?:\n?[ \t]{0,8}</(?:parameter|function|tool_call)>[ \t]{0,8})"
VALUE = Place(
    re.compile(f"\\n{END_PARAMETER}|\\n(?={whole(CALLS)})"),
    re.compile(f"{_CLOSER}{{0,3}}\\n?[ \\t]{{0,8}}(?:{begun(CALLS)})?\\Z"),
)
# One that begins beside its opener, as in `<parameter=x>1</parameter>`, also ends at the first closer.
VALUE_BESIDE = replace(VALUE, marker=re.compile(f"\\n?{END_PARAMETER}|\\n(?={whole(CALLS)})"))
_AFTER_VALUE = re.compile(f"{_CLOSER}{{1,3}}\\n?\\Z|\\n\\Z")


def without_closers(text: str) -> str:
    """A value that ended by another marker than its own, or with the text: without what closes it after all."""
    found = _AFTER_VALUE.search(text, max(0, len(text) - LONGEST_END))
    return text[: found.start()] if found else text


def split_marker(word: str) -> tuple[str, str]:
    """A complete marker without its name, and the name."""
    marker, equals, name = word.partition("=")
    return marker + equals, name[:-1]
