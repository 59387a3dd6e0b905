"""Text of a model's own: its answers to prompts, kept as they come, and the rows that a drafter learns from.

An interrupted run goes on with what the file holds. Every answer is drawn with a seed of its own, so it is the same
whatever ran beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nautilus.data.batch import Batch
from nautilus.data.mix import number_of
from nautilus.data.pack import pack_best_fit
from nautilus.runtime import Progress, UserError, read_metrics
from nautilus.serve import Engine, Sampling
from nautilus.serve.asking import answered


@dataclass(frozen=True, kw_only=True)
class Answer:
    """In tokens; the answer's last is the one that ended it, if any did."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How answers are drawn: temperature 0 for greedy ones; most tokens of each."""

    temperature: float
    tokens: int
    seed: int = 0
    whole: bool = False  # no end before so many tokens

    def sampling(self, index: int) -> Sampling:
        least = self.tokens if self.whole else 0
        seed = number_of(self.seed, index)
        return Sampling(temperature=self.temperature, max_tokens=self.tokens, min_tokens=least, seed=seed)


def answers(path: Path, engine: Engine, prompts: Sequence[Sequence[int]], manner: Manner) -> list[Answer]:
    """The answers to all prompts in their order, taken from the file where it has them; UserError if it has others."""
    rows = read_metrics(path)
    known = {row.get("index"): answer_of(row, path, prompts) for row in rows}
    left = {index: prompt for index, prompt in enumerate(prompts) if index not in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(answer.tokens) for answer in known.values())
    with Progress(path, len(rows) + len(left), len(rows), shown=("tokens",), unit="answer") as progress:
        asked = ((index, engine.request(prompt, manner.sampling(index))) for index, prompt in left.items())
        for step, (index, request) in enumerate(answered(engine, asked), len(rows)):
            done = request.completion()
            known[index] = Answer(prompt=done.prompt, tokens=done.tokens)
            tokens += len(done.tokens)
            row = {"step": step, "index": index, "prompt": [*done.prompt], "answer": [*done.tokens], "tokens": tokens}
            progress(row)
    return [known[index] for index in range(len(prompts))]


def answer_of(row: Mapping, path: Path, prompts: Sequence[Sequence[int]]) -> Answer:
    index, prompt, tokens = row.get("index"), row.get("prompt"), row.get("answer")
    if type(index) is not int or not 0 <= index < len(prompts) or prompt != [*prompts[index]]:
        raise UserError(f"{path} holds answer {index}, but to another prompt than is asked now; remove the file")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise UserError(f"{path} holds no tokens as answer {index}; remove that line, or restore the file")
    return Answer(prompt=tuple(prompts[index]), tokens=tuple(tokens))


def rows_of(found: Sequence[Answer], *, length: int, pad: int) -> Batch:
    """Whole samples in rows of `length`; only tokens of answers count. Longer samples are cut behind it."""
    samples = []
    for answer in found:
        tokens = [*answer.prompt, *answer.tokens][:length]
        samples.append((tokens, [float(place >= len(answer.prompt)) for place in range(len(tokens))]))
    batch = pack_best_fit(samples, length=length, pad=pad)
    if not batch.weights["next_token"].any():
        raise UserError(f"the prompts fill rows of {length} tokens, so that no answer is left; raise length")
    return batch
