"""From places of text to what training and evaluation read: surveyed sources, a tokenizer, shards on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nautilus.data.corpus import Corpus, Source, survey
from nautilus.data.mix import Stream
from nautilus.data.shard import Shard, encode_corpus
from nautilus.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from nautilus.runtime import UserError, atomic_folder


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`shards[source][part]`, part being train or held_out (absent where nothing is held out)."""

    tokenizer: Tokenizer
    corpora: Mapping[str, Corpus]
    shards: Mapping[str, Mapping[str, Shard]]

    def stream(self, *, length: int, rows: int, micro: int, seed: int, reset: bool) -> Stream:
        """Training steps of `rows` rows of `length` tokens, mixed by the sources' weights (None: by their size)."""
        parts = {name: parts["train"].rows(length, reset=reset) for name, parts in self.shards.items()}
        given = {name: corpus.source.weight for name, corpus in self.corpora.items()}
        sizes = {name: weight if weight is not None else float(len(parts[name])) for name, weight in given.items()}
        return Stream(parts, rows=rows, micro=micro, seed=seed, weights=sizes)

    def held_out(self) -> dict[str, list[str]]:
        """The held-out texts of every source that holds some out."""
        return {
            name: [document.text for document in corpus.documents("held_out")]
            for name, corpus in self.corpora.items()
            if corpus.held_out
        }


def prepare(sources: tuple[Source, ...], cache: Path, *, vocab: int, tokenizer: Path | None = None) -> Prepared:
    """Surveys the sources, learns (or loads) the tokenizer, and encodes; what the cache already holds is reused."""
    with bars() as progress:
        task = progress.add_task("reading text", total=len(sources))
        corpora = {}
        for source in sources:
            corpora[source.name] = survey(source)
            progress.advance(task)
        words = tokenizer or cache / f"tokenizer-{vocab}-{'-'.join(c.fingerprint[:8] for c in corpora.values())}"
        if tokenizer is not None and not (words / "tokenizer.json").exists():
            raise UserError(f"tokenizer={words} holds no tokenizer.json; give the folder of one, or leave it out")
        if not (words / "tokenizer.json").exists():
            task = progress.add_task("learning the tokenizer", total=sum(c.train_bytes for c in corpora.values()))
            trained = train_tokenizer(texts(corpora, progress, task), vocab=vocab, template=None)
            with atomic_folder(words) as fresh:
                trained.save(fresh)
        loaded = load_tokenizer(words)
        if loaded.vocab > vocab:
            raise UserError(
                f"the tokenizer in {words} has {loaded.vocab} words but model.vocab={vocab}; raise model.vocab or use "
                f"another tokenizer"
            )
        shards = {}
        for name, corpus in corpora.items():
            task = progress.add_task(f"encoding {name}", total=corpus.train_bytes + corpus.held_out_bytes)
            update = lambda done, total, task=task: progress.update(task, completed=done)
            shards[name] = encode_corpus(corpus, loaded, cache, report=update)
            progress.update(task, completed=corpus.train_bytes + corpus.held_out_bytes)
    return Prepared(tokenizer=loaded, corpora=corpora, shards=shards)


def texts(corpora: Mapping[str, Corpus], progress: Progress, task) -> Iterator[str]:
    for corpus in corpora.values():
        for document in corpus.documents("train"):
            yield document.text
            progress.advance(task, len(document.text.encode()))


def bars() -> Progress:
    columns = TextColumn("{task.description:<22}"), BarColumn(20), TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(*columns, console=Console(stderr=True))
