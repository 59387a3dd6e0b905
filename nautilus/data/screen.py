"""What is done to one task's documents, by the filters and the deduplication of the library `datatrove`.

    screen  read, extract, filter, decontaminate → kept/N.jsonl, and a hash of every document
    find    equal documents of all tasks, by their hashes
    sign    MinHash signatures of the documents that are left
    match   equal signatures, one bucket at a time
    group   documents that match, directly or through others; one of each group stays
    write   kept/N.jsonl without all of those → the text folder

Each of these is a function of (job, number of the task) that writes its files anew and returns what it counted, so a
task that was cut off is simply done again. The language's rules (stop words, sentence ends) are those of English; words
are runs of letters and digits, so scripts without spaces between words need other filters.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import get_filter_result
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from nautilus.data.overlap import Windows
from nautilus.data.pieces import Job, Raw, read_piece
from nautilus.data.tally import Tally

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
SENTENCE = re.compile(r"\S.*?(?:[.!?。？！]+[\"'”’)]*(?=\s|$)|$)", re.DOTALL)
SHINGLES = 4096  # at a time: their hashes, 112 numbers each, stay small
HASHES = HashConfig(hash_fc="sha1")  # the other choice, xxhash, takes no text from its version 4 on
# By default all numbers are one word: tables, exercises and code would be copies of each other.
MINHASH = MinhashConfig(hash_config=HASHES, norm_config=TextNormConfig(norm_numbers=False))
SECONDS = 10.0  # that the extraction of one page may take


class Words(WordTokenizer):
    """Words and sentences by rule: no model to download. Runs of punctuation are words too, as in other tokenizers."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return SENTENCE.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in SENTENCE.finditer(text)]


# The library takes these, though its annotations know only names of languages, and bytes.
WORDS: Any = Words()
HASH: Any = create_hash_func(HASHES)
FILTERS = {
    "repetition": lambda: GopherRepetitionFilter(language=WORDS),
    "quality": lambda: GopherQualityFilter(language=WORDS),
    # Lines need no full stop: headings and lists stay.
    "c4": lambda: C4QualityFilter(filter_no_terminal_punct=False, language=WORDS),
}


class Signatures(MinhashDedupSignature):
    """The library's signatures, of a long document in bounded memory: minima of parts are minima of the whole."""

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        parts = [shingles[i : i + SHINGLES] for i in range(0, len(shingles), SHINGLES)]
        lowest = np.array([super(Signatures, self).get_signature(part) for part in parts], np.uint64).min(axis=0)
        return lowest.tolist()


def whole_text(document: Document) -> str:
    return document.text


EXACT = ExactDedupConfig(content_getter=whole_text, hash_config=HASHES)


# ----- screen --------------------------------------------------------------------------------------------------------


def screen(job: Job, number: int) -> Tally:
    """Documents of the task that pass, into kept/N.jsonl; what the others failed, counted and shown."""
    tally, inspect = Tally(), Inspector(job)
    with open(kept(job, number), "w", encoding="utf-8", newline="\n") as file:

        def passing() -> Iterator[Document]:
            for raw in (raw for piece in job.tasks[number] for raw in read_piece(piece, job.undecodable)):
                tally.see(raw.text or "")
                if (document := inspect(raw, tally)) is not None:
                    file.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
                    yield document

        ExactDedupSignature(str(job.work / "exact"), EXACT).run(passing(), number)
    return tally


class Inspector:
    """Whether a document stays: extraction, language, quality, overlap with evaluation sets, in this order."""

    def __init__(self, job: Job):
        self.job = job
        self.filters = {name: FILTERS[name]() for name in job.filters}
        self.extract = extractor() if job.html or any(p.kind == "html" for task in job.tasks for p in task) else None
        self.language = identifier() if job.languages else None
        self.ngrams = self.windows = None
        if job.sets and job.words:
            config = NGramsDecontConfig(n_grams=job.words, hash_config=HASHES)
            self.ngrams = NGramsDecontFilter(str(job.work / "ngrams"), config, language=WORDS)
        if job.sets and job.width:
            self.windows = Windows(((raw.text or "" for raw in texts) for texts in evaluation(job)), job.width)

    def __call__(self, raw: Raw, tally: Tally) -> Document | None:
        if raw.text is None:
            return tally.drop("undecodable", "not UTF-8", raw.name, "")
        text = raw.text
        if raw.html or self.job.html:
            text, reason = self.extracted(text)
            if not text:
                return tally.drop("extraction", reason, raw.name, raw.text)
        if not text.strip():
            return tally.drop("empty", "no text", raw.name, raw.text)
        document = Document(text=text, id=raw.name)
        if self.language is not None and (found := self.language(text)) not in self.job.languages:
            return tally.drop("language", found, raw.name, raw.text, shown=text)
        for name, each in self.filters.items():
            stays, reason = get_filter_result(each.filter(document))
            if not stays:
                return tally.drop(name, reason or name, raw.name, raw.text, shown=text)
        if found := self.overlap(document):
            return tally.drop("contaminated", found[0], raw.name, raw.text, shown=found[1])
        tally.edit(len(raw.text.encode()) - len(document.text.encode()))
        return document

    def extracted(self, page: str) -> tuple[str, str]:
        """(text, why there is none)."""
        assert self.extract is not None
        try:
            with limited(SECONDS):
                return (self.extract(page) or "").strip(), "no text found"
        except TimeoutError:
            return "", f"took over {SECONDS:g} s"
        except Exception as bad:  # whatever a page does to the parser costs that page alone, and is counted
            return "", f"failed: {type(bad).__name__}"

    def overlap(self, document: Document) -> tuple[str, str] | None:
        """(the set, with how much was shared; the shared stretch)."""
        if self.ngrams is not None and not get_filter_result(self.ngrams.filter(document))[0]:
            name = document.metadata["contaminated_task"]
            return f"{name}, {self.job.words} words", document.metadata["contaminated_ngram"]
        if self.windows is not None and (found := self.windows.find(document.text)):
            return f"{self.job.sets[found[0]][0]}, {self.job.width} bytes", found[1]
        return None


def extractor():
    from datatrove.pipeline.extractors import Trafilatura

    return Trafilatura().extract


def identifier():
    classify = importlib.import_module("py3langid").classify  # its model comes with it
    return lambda text: str(classify(text)[0])


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer. Tasks run in the main thread of their process, which gets signals."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def evaluation(job: Job) -> Iterator[Iterable[Raw]]:
    """The texts of each evaluation set."""
    for _, pieces in job.sets:
        yield (raw for piece in pieces for raw in read_piece(piece, "replace"))


def index_sets(job: Job, _: int) -> Tally:
    """The word n-grams of the evaluation sets, as the library's filter reads them; texts too short are counted."""
    tally = Tally()
    folder = job.work / "ngrams"
    folder.mkdir(exist_ok=True)
    for (name, _pieces), texts in zip(job.sets, evaluation(job), strict=True):
        hashes: set[int] = set()
        for raw in texts:
            words = WORDS.word_tokenize(simplify_text(raw.text or "", NGramsDecontConfig().norm_config))
            grams = [HASH(" ".join(gram)) for gram in ngrams(words, job.words)] if job.words else []
            hashes.update(grams)
            tally.see(raw.text or "")
            if not grams and not 0 < job.width <= len((raw.text or "").encode()):
                tally.drop("too short to be found", name, raw.name, raw.text or "")
        np.array(sorted(hashes), np.uint64).tofile(folder / f"{name}.index.hashes")
    return tally


# ----- the same text again -------------------------------------------------------------------------------------------


def find(job: Job, _: int) -> Tally:
    """Equal documents, all but the first of each."""
    ExactFindDedups(str(job.work / "exact"), str(job.work / "again"), EXACT, lines_to_buffer=1000).run()
    return Tally()


def sign(job: Job, number: int) -> Tally:
    Signatures(str(job.work / "signatures"), MINHASH, language=WORDS).run(unlike(job, number), number)
    return Tally()


def match(job: Job, bucket: int) -> Tally:
    step = MinhashDedupBuckets(
        str(job.work / "signatures"), str(job.work / "matches"), config=MINHASH, lines_to_buffer=1000
    )
    step.run(None, bucket, MINHASH.num_buckets)
    return Tally()


def group(job: Job, _: int) -> Tally:
    MinhashDedupCluster(str(job.work / "matches"), str(job.work / "groups"), MINHASH, lines_to_buffer=1000).run()
    return Tally()


def write(job: Job, number: int) -> Tally:
    """The documents that stay, packed; the same documents give the same bytes."""
    tally = Tally()
    documents = unlike(job, number, tally)
    if job.near:
        near = MinhashDedupFilter(str(job.work / "groups"), exclusion_writer=dropped(tally, "near duplicate"))
        documents = near.run(documents, number)
    beside = job.work / f"text-{number:05d}"
    with open(beside, "wb") as raw:
        with (
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
            io.TextIOWrapper(packed, "utf-8", newline="\n") as file,
        ):
            for document in documents:
                tally.see(document.text)
                file.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(beside, job.text / f"{number:05d}.jsonl.gz")
    return tally


def kept(job: Job, number: int) -> Path:
    return job.work / "kept" / f"{number:05d}.jsonl"


def unlike(job: Job, number: int, tally: Tally | None = None) -> Iterator[Document]:
    """What `screen` kept, without documents that equal another one."""

    def documents() -> Iterator[Document]:
        with open(kept(job, number), encoding="utf-8", newline="\n") as file:
            for line in file:
                row = json.loads(line)
                yield Document(text=row["text"], id=row["id"])

    writer = dropped(Tally() if tally is None else tally, "exact duplicate")
    return ExactDedupFilter(str(job.work / "again"), EXACT, exclusion_writer=writer).run(documents(), number)


class Dropped:
    """Stands where the library expects a writer of what it leaves out."""

    def __init__(self, tally: Tally, stage: str):
        self.tally, self.stage = tally, stage

    def __enter__(self) -> Dropped:
        return self

    def __exit__(self, *error) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        self.tally.drop(self.stage, self.stage, document.id, document.text)


def dropped(tally: Tally, stage: str) -> Any:
    return Dropped(tally, stage)


STAGES = {"index": index_sets, "screen": screen, "find": find, "sign": sign, "match": match, "group": group}
STAGES["write"] = write
