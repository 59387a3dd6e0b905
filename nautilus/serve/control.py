"""Where an answer begins and where it ends: within a thinking block or not; at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.markers import THINK, THOUGHT


class StopStrings:
    """Releases text until a stop string is complete, then nothing more; never a part of one.

    The stop string that is complete first ends the text; of two that end at the same character, the longer one counts.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings, self.held = strings, ""
        self.hit: str | None = None  # the one that ended the text

    def add(self, text: str) -> str:
        if not self.strings:
            return text
        if self.hit:
            return ""
        text = self.held + text
        found = [(text.find(string) + len(string), -len(string), string) for string in self.strings if string in text]
        if found:
            end, length, self.hit = min(found)
            self.held = ""
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


def opens_thinking(tokens: Sequence[int], tokenizer: Tokenizer) -> bool | None:
    """Whether an answer to this prompt begins within a thinking block: the last tag of its last turn counts. None: the
    tokenizer has no such tags. By ids, as the text of a message may spell a tag."""
    if not {THINK, THOUGHT} <= tokenizer.control.keys():
        return None
    tags = {tokenizer.control[THINK]: True, tokenizer.control[THOUGHT]: False, tokenizer.eos: False}
    return next((tags[token] for token in reversed(tokens) if token in tags), False)
