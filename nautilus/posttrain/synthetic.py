"""What a model makes of a text: the same in other words, a question with its answer, a question with four options.

| kind | what a model writes | dropped, whoever verifies it, where |
|--|--|--|
| `rephrase` | the text in other words | it is too short or long, loses or adds numbers or names, or is the text |
| `question` | `Question:`, and `Answer:` in a few words | the question has the answer in it |
| `choice` | `Question:`, `A)` to `D)`, and the letter as `Answer:` | two options are alike |

An `Item` is what was read. A question is verified by the very task that its row will be judged by: `exact` or `mcqa` of
`nautilus/tasks/rows.py`. All of this is text in and text out; who asks a model is `synthesis.py`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nautilus.config import setting
from nautilus.data.corpus import Document
from nautilus.posttrain.contamination import words_of
from nautilus.runtime import UserError
from nautilus.tasks.equal import same_words
from nautilus.tasks.task import Problem, Question, Reply, Verdict, assistant, user

LETTERS = "ABCD"
MOST_WORDS = 12  # of an answer that is compared word by word
ORDERS = [*itertools.permutations(range(len(LETTERS)))]
JUDGED = {"question": "exact", "choice": "mcqa"}  # by which task of rows
SHORT = "Put the answer, in as few words as you can, in \\boxed{}."
LETTER = "Put the letter of the right one in \\boxed{}."
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
WORD = re.compile(r"[^\W\d_]{2,}")
SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n")
OF_THE_TEXT = re.compile(
    r"\b(?:the|this|given|above) (?:\w+ )?(?:text|passage|article|document|paragraph|author)\b|\baccording to\b",
    re.IGNORECASE,
)


class Unreadable(ValueError):
    """An answer in another form than was asked for; the message says why, and answers are counted by it."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """source: the name of the text; question: empty of a rephrasing; answer: what was written, of a choice one of the
    options."""

    kind: str
    source: str
    text: str
    answer: str
    question: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a rephrasing must be. shortest, longest: its characters over those of the text; facts: the share of the
    text's numbers and names that it must have, and of its own that the text must have."""

    shortest: float = setting(0.5, "characters of a rephrasing, of those of its text, at least")
    longest: float = setting(1.5, "at most")
    facts: float = setting(1.0, "share of numbers and names that either must have of the other")

    def __post_init__(self):
        if not (0 <= self.shortest <= self.longest and 0 <= self.facts <= 1):
            raise UserError(
                f"shortest={self.shortest}, longest={self.longest} and facts={self.facts} were asked for; a rephrasing"
                " may be as short as 0 times its text and no longer than longest, and facts is a share, 0 to 1"
            )


# ----- what is asked, and how the answer is read ----------------------------------------------------------------------


class Kind(NamedTuple):
    """ask: what a text is put behind; read: (what was said, the problem's truth) to an item, or Unreadable."""

    ask: str
    read: Callable[[str, Mapping[str, Any]], Item]


def labelled(said: str, labels: Sequence[str]) -> list[str]:
    """What stands behind each label at the beginning of a line; what stands before the first is set aside."""
    pattern = rf"^[*#\s]*({'|'.join(labels)})\**[:.)]\**"
    _, *parts = re.split(pattern, said, flags=re.MULTILINE | re.IGNORECASE)
    found, values = [label.capitalize() for label in parts[::2]], [value.strip(" *\n\t") for value in parts[1::2]]
    if absent := [label for label in labels if label not in found]:
        raise Unreadable(f"no {absent[0]}")
    if found != [*labels]:
        raise Unreadable("labels twice or in another order")
    if not all(values):
        raise Unreadable("nothing behind a label")
    return values


def read_rephrase(said: str, truth: Mapping[str, Any]) -> Item:
    return Item(kind="rephrase", answer=said.strip(), **truth)


def read_question(said: str, truth: Mapping[str, Any]) -> Item:
    question, answer = labelled(said, ("Question", "Answer"))
    answer = answer.removesuffix(".")
    if len(answer.split()) > MOST_WORDS:
        raise Unreadable("long answer")
    if re.search(r"[{}\n]", answer):  # would not stand in a box
        raise Unreadable("answer with lines or braces")
    return Item(kind="question", question=question, answer=answer, **truth)


def read_choice(said: str, truth: Mapping[str, Any]) -> Item:
    question, *options, answer = labelled(said, ("Question", *LETTERS, "Answer"))
    found = re.match(rf"\(?([{LETTERS}])(?!\w)", answer)
    if found is None:
        raise Unreadable("no letter")
    if any(same_words(*two) for two in itertools.combinations(options, 2)):
        raise Unreadable("options alike")
    right = options[LETTERS.index(found[1])]
    return Item(kind="choice", question=question, answer=right, options=tuple(options), **truth)


KINDS = {
    "rephrase": Kind(
        "Say the text below in other words. Keep every fact, number and name, add none, and write nothing else.",
        read_rephrase,
    ),
    "question": Kind(
        "Write a question that the text below answers, and the answer in a few words. The question must be clear to"
        " someone who does not see the text. Write two lines, and nothing else:\nQuestion: ...\nAnswer: ...",
        read_question,
    ),
    "choice": Kind(
        "Write a question that the text below answers, and four options of which one is right. The question must be"
        " clear to someone who does not see the text. Write six lines, and nothing else:\nQuestion: ...\nA) ...\n"
        "B) ...\nC) ...\nD) ...\nAnswer: the letter",
        read_choice,
    ),
}


class Writing(Question):
    """Texts as problems of a task: an answer is worth 1 if it can be read."""

    thinks = False

    def __init__(self, kind: str, documents: Sequence[Document]):
        self.name, self.asked = kind, [asking_of(kind, one.text, f"{one.source}/{one.name}") for one in documents]

    def draw(self, rng: random.Random, level: int) -> Problem:
        return rng.choice(self.asked)

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        if not reply.ended:
            return Verdict(reward=0.0, why="cut off")
        try:
            KINDS[self.name].read(reply.content, problem.truth)
        except Unreadable as bad:
            return Verdict(reward=0.0, why=str(bad))
        return Verdict(reward=1.0)


def asking_of(kind: str, text: str, source: str) -> Problem:
    asked = user(f"{KINDS[kind].ask}\n\n{text}")
    return Problem(task=kind, level=1, messages=asked, truth={"source": source, "text": text})


# ----- what can be known without a model ------------------------------------------------------------------------------


def facts(text: str) -> set[str]:
    """Numbers, without commas between thousands, and words that are capitalised inside a sentence, in lower case. The
    first word of a sentence says nothing by its capital. By the rules of English."""
    names = {word for sentence in SENTENCE.split(text) for word in WORD.findall(sentence)[1:] if word[0].isupper()}
    return numbers(text) | {name.casefold() for name in names}


def numbers(text: str) -> set[str]:
    return {re.sub(r",(?=\d{3}(?!\d))", "", found) for found in NUMBER.findall(text)}


def standing(text: str, other: str) -> float:
    """The share of a text's facts that stand in the other one; 1 where there are none."""
    wanted = facts(text)
    there = numbers(other) | {word.casefold() for word in WORD.findall(other)}
    return len(wanted & there) / len(wanted) if wanted else 1.0


def fault(item: Item, bounds: Bounds, *, given: bool) -> str:
    """Why it cannot be used, "" if it can as far as this is known. given: the question will come with its text."""
    if item.kind == "rephrase":
        return fault_of_words(item, bounds)
    if not given and OF_THE_TEXT.search(item.question):
        return "asks of the text"
    question, answer = (f" {' '.join(words_of(words))} " for words in (item.question, item.answer))
    return "answer in the question" if item.kind == "question" and answer in question else ""


def fault_of_words(item: Item, bounds: Bounds) -> str:
    ratio = len(item.answer) / max(1, len(item.text.strip()))
    if not bounds.shortest <= ratio <= bounds.longest:
        return "too short" if ratio < bounds.shortest else "too long"
    if item.answer.split() == item.text.split():
        return "the text itself"
    if standing(item.text, item.answer) < bounds.facts:
        return "loses numbers or names"
    return "adds numbers or names" if standing(item.answer, item.text) < bounds.facts else ""


# ----- as rows --------------------------------------------------------------------------------------------------------


def problem_of(item: Item, *, given: bool, order: Sequence[int] = ORDERS[0]) -> Problem:
    """The question as a task asks it, with its text before it where that is given; order: of the options."""
    asked, truth = f"{item.question}\n{SHORT}", item.answer
    if item.kind == "choice":
        shown = "\n".join(f"{letter}) {item.options[at]}" for letter, at in zip(LETTERS, order, strict=True))
        asked, truth = f"{item.question}\n{shown}\n{LETTER}", LETTERS[order.index(item.options.index(item.answer))]
    asked = f"{item.text}\n\n{asked}" if given else asked
    return Problem(
        task=JUDGED[item.kind], level=1, messages=user(asked), truth={"expected_answer": truth},
        worked=(assistant(f"\\boxed{{{truth}}}"),),
    )  # fmt: skip


def orders(item: Item, count: int, seed: int) -> list[Sequence[int]]:
    """So many different orders of the options, of which there are 24."""
    return random.Random(f"{seed} {item.question}").sample(ORDERS, count)


def checks(item: Item, times: int, seed: int) -> list[Problem]:
    """What a verifier is asked, the text always given."""
    if item.kind == "question":
        return [problem_of(item, given=True)] * times
    return [problem_of(item, given=True, order=order) for order in orders(item, times, seed)]


def conversation_of(item: Item, *, given: bool, seed: int) -> dict[str, Any]:
    """As a row that `nautilus sft data=` reads; the options in an order of their own, or most answers would be B."""
    if item.kind == "rephrase":
        messages = (*asking_of("rephrase", item.text, item.source).messages, assistant(item.answer))
    else:
        one = row_problem(item, given=given, seed=seed)
        messages = (*one.messages, *one.worked)
    return {"messages": [*messages], "kind": item.kind, "source": item.source}


def row_problem(item: Item, *, given: bool, seed: int) -> Problem:
    """As a row that the tasks `exact` and `mcqa` read."""
    return problem_of(item, given=given, order=orders(item, 1, seed + 1)[0])
