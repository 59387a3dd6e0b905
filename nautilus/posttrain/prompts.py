"""What a model is asked so that it writes text of its own: given texts, beginnings of the documents that its run was
trained on, or beginnings that it writes itself."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nautilus.data.chat import chat_tokens
from nautilus.data.corpus import read, sources
from nautilus.data.shard import Shard, open_shards
from nautilus.data.tokenizer import Tokenizer
from nautilus.posttrain.drafter import NoDrafts
from nautilus.posttrain.own_text import Manner, answers
from nautilus.runtime import Run, is_run
from nautilus.serve import Engine

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """So many prompts to learn from and so many others to measure on, each of at most `tokens` tokens.

    places: texts, as `nautilus.data.corpus.sources` reads them; chat: each is a message of a user.
    """

    learnt: int
    measured: int
    tokens: int
    places: tuple[str, ...] = ()
    chat: bool = False
    seed: int = 0


def prompts(run: Run, engine: Engine, model: str | Path, wanted: Wanted) -> tuple[list[Tokens], list[Tokens]]:
    """(to learn from, to measure on); no prompt is in both. Where there are too few to learn from they come again."""
    if wanted.places:
        found = shuffled(given(engine.tokenizer, wanted), wanted.seed)
    elif is_run(model) and (shards := shards_of(Run(model))):
        parts = {name: [shard for shard in shards if shard.part == name] for name in ("held_out", "train")}
        found = [
            *openings(parts["held_out"], wanted.measured, wanted),
            *openings(parts["train"], wanted.measured + wanted.learnt, wanted),
        ]
    else:
        found = own_beginnings(run, engine, wanted)
    found = [*dict.fromkeys(found)]
    measured, learnt = found[: wanted.measured], found[wanted.measured :]
    if not learnt:
        long = f", messages of more than prompt_tokens={wanted.tokens} left out" if wanted.chat else ""
        raise NoDrafts(
            f"{len(found)} prompts were found{long}, where measured={wanted.measured} of them are only measured on and"
            f" at least one more is to be learnt from; give more text{' or longer prompts' if long else ''}, or measure"
            " on fewer"
        )
    return [learnt[index % len(learnt)] for index in range(wanted.learnt)], measured


def shuffled(found: Iterator[Tokens], seed: int) -> list[Tokens]:
    everything = sorted(dict.fromkeys(found))
    random.Random(seed).shuffle(everything)
    return everything


def given(tokenizer: Tokenizer, wanted: Wanted) -> Iterator[Tokens]:
    """Texts as prompts, cut; messages whole, or left out where they are longer."""
    start = tokenizer.core.encode("").ids
    for source in sources(wanted.places):
        for document in read(source):
            if not wanted.chat:
                yield tuple([*start, *tokenizer.encode(document.text)][: wanted.tokens])
                continue
            message = chat_tokens(tokenizer, [{"role": "user", "content": document.text}])
            if len(message) <= wanted.tokens:
                yield tuple(message)


def shards_of(run: Run) -> list[Shard]:
    """The encoded text of a run's sources."""
    folders = sorted(index.parent for index in (run.folder / "data").glob("*/index.json"))
    return [shard for folder in folders for shard in open_shards(folder, verify=False).values()]


def openings(shards: Sequence[Shard], count: int, wanted: Wanted) -> list[Tokens]:
    """How documents begin that are drawn from all shards, each as likely as any other."""
    flats = [np.memmap(shard.path, dtype=shard.dtype, mode="r") for shard in shards]
    begins = []
    for number, (shard, flat_T) in enumerate(zip(shards, flats, strict=True)):
        edges = np.flatnonzero(flat_T == shard.document_end)
        starts = [0, *(edges[:-1] + 1).tolist()]
        begins += [(number, start, int(end)) for start, end in zip(starts, edges, strict=True) if end > start]
    chosen = random.Random(wanted.seed).sample(begins, min(count, len(begins)))
    return [tuple(flats[n][start : min(end, start + wanted.tokens)].tolist()) for n, start, end in chosen]


def own_beginnings(run: Run, engine: Engine, wanted: Wanted) -> list[Tokens]:
    """What the model writes at the start of a document, at temperature 1."""
    count, start = wanted.measured + wanted.learnt, (engine.tokenizer.document_end,)
    apart = wanted.seed + (1 << 32)  # other draws than those of the answers that follow
    manner = Manner(temperature=1, tokens=max(1, wanted.tokens - 1), seed=apart, whole=True)
    written = answers(run.state / "beginnings.jsonl", engine, [start] * count, manner)
    return [(*start, *answer.tokens) for answer in written]
