"""The data card (README.md) beside a set of text that was curated or encoded."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nautilus.data.curate import Result

CURATED = """\
# Data card

Text in `text/*.jsonl.gz`, one object with `id` and `text` a line.

| | |
|---|---|
{facts}

## What was left out

| step | reason | documents | bytes |
|---|---|---|---|
{dropped}

Documents that stayed lost {edited_bytes:,} bytes, {edited:,} of them some: what is no text of a page, and lines that a
filter took out.

## Settings

| | |
|---|---|
{settings}

## What this does not say

Nothing here is a judgement of licence, of personal data or of truth: the filters count words, lines and repetitions.
The rules of quality are made for English prose. Near duplicates are found by MinHash, which misses some; the run of
words or bytes that gives an evaluation set away is found wherever it is equal, and a paraphrase is not.
"""

ENCODED = """\
# Data card

The text of source `{source}` as tokens, in flat files that `nautilus pretrain` reads.

| | |
|---|---|
{facts}

The tokens are those of one tokenizer and one text, named by the hashes above; the text itself is not kept here, and
neither is its licence.
"""


def curated_card(result: Result, settings: Mapping[str, object]) -> str:
    before, after, dropped = result.before, result.after, result.dropped
    facts = {
        "found": f"{before.documents:,} documents, {before.bytes:,} bytes",
        "kept": f"{after.documents:,} documents, {after.bytes:,} bytes",
        "evaluation sets": f"{result.sets.documents:,} texts kept out" if result.sets else "none were given",
        "made by": f"Nautilus on Python {platform.python_version()}",
    }
    if result.sets and (short := result.sets.total("too short to be found")[0]):
        facts["evaluation texts too short to be looked for"] = f"{short:,}"
    rows = [
        f"| {cell(stage)} | {cell(reason)} | {count:,} | {size:,} |"
        for stage, reasons in dropped.dropped.items()
        for reason, (count, size) in sorted(reasons.items(), key=lambda each: -each[1][0])
    ]
    return CURATED.format(
        facts=table(facts),
        dropped="\n".join(rows or ["| nothing | | 0 | 0 |"]),
        settings=table(settings),
        edited=before.edited,
        edited_bytes=before.edited_bytes,
    )


def encoded_card(index: Mapping) -> str:
    """What an encoded source is, from the index beside it."""
    facts = {"corpus": f"`{index['corpus']}`", "tokenizer": f"`{index['tokenizer']}`", "read by": index["python"]}
    facts["left out as no UTF-8"] = f"{index['skipped']:,} documents"
    for part, entry in index["parts"].items():
        facts[part.replace("_", " ")] = (
            f"{entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens"
        )
    return ENCODED.format(source=cell(index["source"]), facts=table(facts))


def table(rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {cell(name)} | {cell(value)} |" for name, value in rows.items())


def cell(value: object) -> str:
    """Text that cannot end its cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")
