"""Needles in a haystack: keys with values somewhere in filler, asked for later. Text to train on, and the measure.

    low tide M=q over green hills Z=c and then M?q far out Z?c …

A document holds `pairs` needles, " K=v", each with a question, " K?v", further on; filler of random words makes up the
rest, so where they stand and how far apart is random and grows with the length. Keys are different capital letters,
values are small letters: guessing is right once in 26. A document has length - 1 bytes, so that with its end token it
is exactly one row where a token is a byte (model.vocab=274 leaves no room for others).
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from nautilus.eval.loss import reading
from nautilus.runtime import UserError, write_atomic

WORDS = "and at by dark far fish foam from green grey hills in keel low moon of old out over reef sail salt sea ship "
WORDS += "shore slow star stone the then tide under water wave west wind with"
ITEM = len(" K=v")
BUDGET = 1 << 14  # tokens of a forward pass


class Haystack(NamedTuple):
    text: str
    answers: list[int]  # where the value of each question stands


def haystack(draw: random.Random, length: int, pairs: int) -> Haystack:
    """One document of length - 1 bytes. ValueError where the needles and their questions do not fit."""
    filler = length - 1 - 2 * pairs * ITEM
    if filler < 0 or not 1 <= pairs <= len(string.ascii_uppercase):
        raise ValueError(
            f"{pairs} needles with questions do not fit into {length} tokens; lower one or raise the other"
        )
    keys = draw.sample(string.ascii_uppercase, pairs)
    values = {key: draw.choice(string.ascii_lowercase) for key in keys}
    cuts = [0, *sorted(draw.randint(0, filler) for _ in range(2 * pairs)), filler]
    text, answers, asked = "", [], dict.fromkeys(keys, "=")
    for key, low, high in zip(draw.sample(keys * 2, 2 * pairs), cuts, cuts[1:], strict=False):
        text += words(draw, high - low) + f" {key}{asked[key]}{values[key]}"
        if asked[key] == "?":
            answers.append(len(text) - 1)
        asked[key] = "?"
    return Haystack(text + words(draw, filler - cuts[-2]), answers)


def words(draw: random.Random, size: int) -> str:
    """So many characters of random words, the last of them perhaps cut."""
    text = ""
    while len(text) < size:
        text += " " + draw.choice(WORDS.split())
    return text[:size]


def write_needles(path: Path, *, documents: int, length: int, pairs: int, seed: int = 0) -> None:
    """A JSONL file of documents to train on."""
    draw = random.Random(f"train {seed}")
    rows = (json.dumps({"text": haystack(draw, length, pairs).text}) + "\n" for _ in range(documents))
    write_atomic(path, "".join(rows))


def retrieval(
    model, tokenizer, lengths: Sequence[int], *, pairs: int, documents: int = 64, seed: int = 0
) -> Mapping[int, float]:
    """Length of the documents → share of their questions whose value is the most likely next token.

    The documents are others than those of `write_needles`, the same for every model.
    """
    found = {}
    for length in lengths:
        draw = random.Random(f"test {seed} {length}")
        found[length] = share_right(model, tokenizer, [haystack(draw, length, pairs) for _ in range(documents)])
    return found


def share_right(model, tokenizer, documents: Sequence[Haystack]) -> float:
    right, rows = 0, max(1, BUDGET // len(documents[0].text))
    for low in range(0, len(documents), rows):
        part = documents[low : low + rows]
        tokens = [tokenizer.encode(each.text) for each in part]
        if any(len(row) != len(each.text) for row, each in zip(tokens, part, strict=True)):
            raise UserError(
                "needles are asked for by the byte, but this tokenizer has longer words; use model.vocab=274"
            )
        tokens_BT = torch.tensor(tokens, device=model.head_weight.device)
        with reading(model):
            hidden_BTD, _ = model.hidden(tokens_BT)
        for row_T, hidden_TD, each in zip(tokens_BT, hidden_BTD, part, strict=True):
            at = torch.tensor(each.answers)
            guess = (hidden_TD[at - 1].float() @ model.head_weight.float().T).argmax(-1)
            right += int((guess == row_T[at]).sum())
    return right / sum(len(each.answers) for each in documents)
