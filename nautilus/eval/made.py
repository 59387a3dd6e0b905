"""Prompts of all six families with their answers, made from a seed: for evaluation, and to train small models on.

| family | kinds |
|--|--|
| agentic | document: rows changed in a file; loop: an agent reads files and writes them changed |
| code | rename: functions renamed in a file; accessors: code for the fields of a class in another file |
| structured | records: JSON by a schema; query: SQL over given tables; calls: calls of given functions |
| multihop | hops: facts in a row, named with the answer |
| long | summary: the first sentences of sections; minutes: the decisions of a meeting |
| open | story, ideas: texts of which the prompt says little |

All are plain ASCII with small vocabularies: bytes do as tokens. A prompt is filled up until it and its answer have
about `size` bytes. What is asked in evaluation is never trained on, whatever the seeds: a prompt is for the one or the
other by its own hash.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping

from nautilus.eval import made_files, made_texts
from nautilus.eval.families import FAMILIES, Prompt
from nautilus.eval.ruler import largest
from nautilus.runtime import UserError

Make = Callable[[random.Random, int, int], tuple[str, str]]
KINDS: dict[str, dict[str, Make]] = {
    "agentic": {"document": made_files.document, "loop": made_files.loop},
    "code": {"rename": made_files.rename, "accessors": made_files.accessors},
    "structured": {"records": made_files.records, "query": made_files.query, "calls": made_files.calls},
    "multihop": {"hops": made_texts.hops},
    "long": {"summary": made_texts.summary, "minutes": made_texts.minutes},
    "open": {"story": made_texts.story, "ideas": made_texts.ideas},
}
SIZES = {"agentic": 1024, "code": 1024, "structured": 768, "multihop": 1024, "long": 2048, "open": 512}  # bytes
SMALLEST, STEPS = 200, 3  # the shortest text to train on, and the most steps
HELD_OUT = 4  # one prompt in so many is for evaluation
END = "\n\nAnswer:\n"


def prompts(family: str, count: int, *, seed: int = 0, size: int = 0, steps: int = 1) -> list[Prompt]:
    """So many prompts for evaluation, all kinds of a family by turns. size: bytes with the answer (0: as in SIZES);
    steps: from 1 to 3, how much is asked for at once. UserError where a size is too small for what it shall hold."""
    if family not in FAMILIES or not 1 <= steps <= STEPS:
        raise UserError(
            f"family={family!r} with steps={steps}: have {', '.join(FAMILIES)}, with steps from 1 to {STEPS}"
        )
    kinds, found, size = itertools.cycle(KINDS[family]), [], size or SIZES[family]
    for index, kind in zip(range(count), kinds, strict=False):
        prompt, answer = made(family, kind, f"{seed} {index}", size=size, steps=steps, held_out=True)
        if (needed := len(prompt) + len(answer)) > size:
            raise UserError(
                f"size={size} was asked for, but a prompt of {family} ({kind}) with steps={steps} and its answer take "
                f"{needed} bytes; raise size or lower steps"
            )
        id = f"{kind}/{seed}/{size}/{steps}/{index}"
        found.append(Prompt(id=id, family=family, set=f"made_{family}", prompt=prompt, reference=answer))
    return found


def training_documents(count: int, *, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> Iterator[str]:
    """So many documents to train on, each a prompt with its answer: the families of `sizes` by turns, of all sizes from
    SMALLEST to theirs and all steps."""
    draw, families = random.Random(f"training {seed}"), itertools.cycle(sizes)
    for index, family in zip(range(count), families, strict=False):
        kind = draw.choice([*KINDS[family]])
        size = round(SMALLEST * (sizes[family] / SMALLEST) ** draw.random())
        yield "".join(made(family, kind, f"{seed} {index}", size=size, steps=draw.randint(1, STEPS), held_out=False))


def made(family: str, kind: str, key: str, *, size: int, steps: int, held_out: bool) -> tuple[str, str]:
    """A prompt and its answer, of at most `size` bytes where one without filling is not longer than that already."""
    for attempt in itertools.count():
        question, answer = filled(KINDS[family][kind], f"{kind} {key} {size} {steps} {attempt}", size, steps)
        if is_held_out(question) == held_out:
            return question + END, answer
    raise AssertionError


def filled(make: Make, key: str, size: int, steps: int) -> tuple[str, str]:
    build = lambda more: make(random.Random(key), more, steps)
    fits = lambda more: sum(map(len, build(more))) + len(END) <= size
    return build(largest(fits) if fits(0) else 0)


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT == 0
