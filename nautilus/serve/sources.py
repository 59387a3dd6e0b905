"""Where the tokens of an answer came from, told beside the text in which they show; `Piece.source` has the names.

Told are runs, [source, tokens, characters]: so many tokens in a row of one source, and how many characters of what is
shown they make. A token that shows in two texts is counted in the first of them, one that shows in none with 0
characters. Characters are Unicode's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from nautilus.serve.request import Piece
from nautilus.serve.toolcalls import Content, Delta, Reasoning

PLAIN = "plain"
SHORT = 64  # characters that are looked for one by one at most
Run = list  # [source, tokens, characters]


class Origins:
    """Of one answer that an AnswerStream reads, which drops some characters and holds others back for a while.

    read: what a piece made certain; take: the runs of the next text that is shown.
    """

    def __init__(self):
        self.text = ""  # what may still be shown
        self.owners: deque[Run] = deque()  # whose characters these are
        self.runs: deque[Run] = deque()  # certain, and not taken yet

    def read(self, piece: Piece, shown: Iterable[Delta], held: int | None) -> None:
        """held: see `AnswerStream.held`."""
        self.text += piece.text
        self.owners.append([piece.source, int(piece.token >= 0), len(piece.text)])
        self.show(shown)
        if held is not None:
            self.move(max(0, len(self.text) - held), shown=False)

    def finish(self, shown: Iterable[Delta]) -> None:
        """What was held back until the end, or was no text at all."""
        self.show(shown)
        self.move(len(self.text), shown=False)

    def show(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, Reasoning | Content):
                text = delta.text
                apart = len(text) < SHORT and text not in self.text  # something was dropped in between
                for part in text if apart else [text]:
                    self.move(max(0, self.text.find(part)), shown=False)  # it begins behind what was dropped
                    self.move(len(part), shown=True)

    def move(self, count: int, *, shown: bool) -> None:
        """Past so many characters, and the tokens without any that follow."""
        self.text = self.text[count:]
        while self.owners and (count or not self.owners[0][2]):
            source, tokens, length = self.owners.popleft()
            step = min(count, length)
            self.runs.append([source, tokens, step if shown else 0])
            count -= step
            if step < length:
                self.owners.appendleft([source, 0, length - step])
        if count:  # a parser that told its texts in another order, as where reasoning becomes content at the end
            self.runs.append([PLAIN, 0, count if shown else 0])

    def take(self, characters: int | None = None) -> list[Run]:
        """The runs of so many, with the tokens around them that show in no text; None: all that are certain."""
        taken = []
        while self.runs and (characters is None or self.runs[0][2] <= characters):
            run = self.runs.popleft()
            taken.append(run)
            if characters is not None:
                characters -= run[2]
        return merged(taken)


def merged(runs: Iterable[Sequence]) -> list[Run]:
    """Neighbours of one source as one."""
    found: list[Run] = []
    for source, tokens, characters in runs:
        if found and found[-1][0] == source:
            found[-1][1] += tokens
            found[-1][2] += characters
        elif tokens or characters:
            found.append([source, tokens, characters])
    return found


def runs_of(pieces: Iterable[Piece]) -> list[Run]:
    """Where all of their text is shown."""
    return merged((piece.source, int(piece.token >= 0), len(piece.text)) for piece in pieces)


def passes(sources: Sequence[str]) -> int:
    """In how many passes of the model these tokens of one answer came: the last of a pass was not foretold, unless the
    answer ended before it."""
    return sum(source == PLAIN for source in sources) + (bool(sources) and sources[-1] != PLAIN)
