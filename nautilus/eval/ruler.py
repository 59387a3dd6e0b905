"""Retrieval in long texts by tasks in the manner of RULER (arXiv 2404.06654); every text is made here, from a seed.

    single       the number that one name has, in filler                    4 names have one in multikey
    multivalue   the 4 numbers of one name                                  multiquery: of 4 names
    variables    all names of one value, handed on in 4 steps               words: the 10 that come 30 times, others 3
    pairs        bytes for models that were trained on them, see `needle`; its questions share their document

A text is filled up until it and the longest answer have the length that is asked for, in tokens. The score of an answer
is the share of what was asked for that it holds, in upper or lower case; in pairs it must begin with it.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nautilus.eval.needle import ITEM, haystack, words
from nautilus.runtime import UserError

PAIRS = 8  # needles of a document, each with its question
SPARE = 16  # tokens of an answer beside what is asked for, and as many again as that
SENTENCE = 60  # characters of filler
ADJECTIVES = (
    "amber brave calm dusty early faded gentle hollow icy jolly keen lively mellow narrow olive plain quiet rapid"
)
ADJECTIVES += " silver tidy upper vivid warm young"
NOUNS = "anchor bridge candle dial engine ferry garden harbour island jacket kettle ladder mirror needle orchard pillow"
NOUNS += " quarry ribbon saddle tunnel urn valley window yard"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


class Example(NamedTuple):
    """What is asked, and all that the answer should hold. begins: nothing may stand before it."""

    text: str
    answers: tuple[str, ...]
    begins: bool = False

    def score(self, answer: str) -> float:
        if self.begins:
            return float(answer.lstrip().startswith(self.answers[0]))
        return sum(each.lower() in answer.lower() for each in self.answers) / len(self.answers)


Build = Callable[[random.Random, int, int], Example]  # (draw, size of the filler, number of the question)


def needles(draw: random.Random, size: int, *, names: int, values: int, asked: int) -> Example:
    """`size` sentences of filler, facts about `names` names with `values` numbers each among them."""
    pairs = draw.sample([*itertools.product(ADJECTIVES.split(), NOUNS.split())], names)
    called = [" ".join(pair) for pair in pairs]
    numbers = iter(draw.sample(range(10**6, 10**7), names * values))
    kept = [(name, str(next(numbers))) for name in called for _ in range(values)]
    facts = [f"A number that belongs to the {name} is {number}." for name, number in kept]
    text = spread(draw, draw.sample(facts, len(facts)), size)
    wanted = " and the ".join(called[:asked])
    question = f"Which numbers belong to the {wanted}? Answer: The numbers that belong to the {wanted} are"
    about = "Numbers belong to some things in this text. Keep them in mind, for they are asked for at its end."
    return Example(f"{about}\n\n{text}\n\n{question}", tuple(number for name, number in kept if name in called[:asked]))


def spread(draw: random.Random, facts: Sequence[str], size: int) -> str:
    """The facts, in their order, at random places among so many sentences of filler."""
    places = sorted(draw.randint(0, size) for _ in facts)
    sentences = [words(draw, draw.randint(SENTENCE // 2, SENTENCE)).strip().capitalize() + "." for _ in range(size)]
    for place, fact in reversed([*zip(places, facts, strict=True)]):
        sentences.insert(place, fact)
    return " ".join(sentences)


def variables(draw: random.Random, size: int, question: int, steps: int = 4) -> Example:
    """A value that one variable gets and others take over from the one before."""
    names = ["".join(draw.choices(string.ascii_uppercase, k=5)) for _ in range(steps + 1)]
    value = str(draw.randrange(10**4, 10**5))
    facts = [
        f"VAR {name} = {before}." for name, before in zip(names, [value, *(f"VAR {n}" for n in names)], strict=False)
    ]
    about = "This text sets variables, some of them to others. Follow them, for they are asked for at its end."
    asked = f"Which variables have the value {value}, their own or another's? "
    asked += f"Answer: The {steps + 1} variables that have the value {value} are"
    return Example(f"{about}\n\n{spread(draw, facts, size)}\n\n{asked}", tuple(names))


def common_words(
    draw: random.Random, size: int, question: int, common: int = 10, often: int = 30, seldom: int = 3
) -> Example:
    """`common` words that come `often` times, among `size` words that come `seldom`."""
    invented = dict.fromkeys(invent(draw) for _ in range(4 * (common + size)))
    chosen = [*itertools.islice(invented, common + size)]
    listed = chosen[:common] * often + chosen[common:] * seldom
    draw.shuffle(listed)
    about = f"This is a list of words. A few of them come much more often than all others; which {common} are these?"
    asked = f"Answer: The {common} words that come most often are"
    return Example(f"{about}\n\n{' '.join(listed)}\n\n{asked}", tuple(chosen[:common]))


def invent(draw: random.Random) -> str:
    return "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(3))


def pairs(draw: random.Random, size: int, question: int) -> Example:
    found = haystack(draw, size + 2 * PAIRS * ITEM + 1, PAIRS)
    at = found.answers[question % PAIRS]
    return Example(found.text[:at], (found.text[at],), begins=True)


def about(**how: int) -> Build:
    return lambda draw, size, question: needles(draw, size, **how)


TASKS: dict[str, Build] = {
    "single": about(names=1, values=1, asked=1),
    "multikey": about(names=4, values=1, asked=1),
    "multivalue": about(names=1, values=4, asked=1),
    "multiquery": about(names=4, values=1, asked=4),
    "variables": variables,
    "words": common_words,
    "pairs": pairs,
}
DEFAULT = tuple(name for name in TASKS if name != "pairs")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One example, ready to be asked: its tokens, and how many the answer may have."""

    task: str
    length: int
    index: int
    example: Example
    tokens: Sequence[int]
    longest: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.length, self.index


def question(
    task: str, length: int, index: int, *, seed: int, tokens_of: Callable[[str], list[int]], more: int = 0
) -> Question:
    """Number `index` of a task, filled up to so many tokens, those of the answer and `more` included.

    tokens_of: of a text, as the model is given it. UserError where not even a text without filler fits.
    """
    # The questions of a document are drawn alike: they are those of one text.
    number = index // PAIRS if task == "pairs" else index
    at = index % PAIRS if task == "pairs" else 0
    build = lambda size, last=at: TASKS[task](random.Random(f"{seed} {task} {length} {number}"), size, last)
    example = build(0)
    answer = len(tokens_of(" ".join(example.answers))) - len(tokens_of(""))
    longest = more + (answer if example.begins else 2 * answer + SPARE)
    fills = lambda size: len(tokens_of(build(size, PAIRS - 1).text)) + longest
    if fills(0) > length:
        raise UserError(
            f"task {task} of length={length} was asked for, but without any filler it takes {fills(0)} tokens already, "
            f"{longest} of them for the answer; ask for a greater length, or leave the task out of tasks="
        )
    example = build(largest(lambda size: fills(size) <= length))
    return Question(
        task=task, length=length, index=index, example=example, tokens=tokens_of(example.text), longest=longest
    )


def largest(fits: Callable[[int], bool]) -> int:
    """The largest size that fits; 0 does. It is doubled until it does not, and then halved in between."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 256):  # within half a percent: nobody asks for the last sentence of filler
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def keys(tasks: Sequence[str], lengths: Sequence[int], samples: int) -> Iterator[tuple[str, int, int]]:
    """(task, length, number of the question), so that an interrupted run has some of every task."""
    for index in range(samples):
        for length in sorted(lengths):
            for task in tasks:
                yield task, length, index
