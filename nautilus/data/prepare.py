"""From places of text to what training and evaluation read: surveyed sources, a tokenizer, shards on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nautilus.data.corpus import Corpus, Source, survey
from nautilus.data.megatron import open_megatron
from nautilus.data.mix import Phase, Stream
from nautilus.data.shard import Shard, encode_corpus
from nautilus.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from nautilus.runtime import UserError, atomic_folder
from nautilus.runtime.progress import screen


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`shards[source][part]`, part being train or held_out (absent where nothing is held out)."""

    tokenizer: Tokenizer
    corpora: Mapping[str, Corpus]
    shards: Mapping[str, Mapping[str, Shard]]

    def stream(
        self,
        *,
        length: int,
        rows: int,
        micro: int,
        seed: int,
        reset: bool,
        phases: Sequence[Phase] = (),
        rank: int = 0,
        ranks: int = 1,
    ) -> Stream:
        """Training steps of `rows` rows of `length` tokens, mixed by the weights of the phases or, where there are
        none, of the sources (None: by their size)."""
        used = {name for phase in phases for name, weight in phase.weights.items() if weight} or {*self.shards}
        parts = {name: self.shards[name]["train"].rows(length, reset=reset) for name in self.shards if name in used}
        given = {name: self.corpora[name].source.weight for name in parts}
        sizes = {name: weight if weight is not None else float(len(parts[name])) for name, weight in given.items()}
        if phases:
            sizes = {name: phases[0].weights.get(name, 0.0) for name in parts}
        return Stream(parts, rows=rows, micro=micro, seed=seed, weights=sizes, later=phases[1:], rank=rank, ranks=ranks)

    def facts(self) -> dict[str, str]:
        """What a model card says of the text: every source with the hash of it, and how much of it there is."""
        rows = {}
        for name, corpus in self.corpora.items():
            train = self.shards[name]["train"]
            size = f"{corpus.train_bytes:,} bytes, " if corpus.train_bytes else ""
            apart = f"; {len(corpus.held_out):,} of its documents held out" if corpus.held_out else ""
            rows[f"text: {name}"] = f"{size}{train.tokens:,} tokens, `{corpus.fingerprint[:12]}`{apart}"
        return rows

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
            if source.kind != "tokens":
                corpora[source.name] = survey(source)
            progress.advance(task)
        if tokenizer is None and len(corpora) < len(sources):
            raise UserError("sources of tokens need tokenizer=FOLDER, the tokenizer that they were prepared with")
        words = tokenizer or learnt(corpora, cache, vocab, progress)
        if not (words / "tokenizer.json").exists():
            raise UserError(f"tokenizer={words} holds no tokenizer.json; give the folder of one, or leave it out")
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
        for source in sources:
            if source.kind == "tokens":
                corpora[source.name], shards[source.name] = already_tokens(source, loaded)
    return Prepared(tokenizer=loaded, corpora=corpora, shards=shards)


def learnt(corpora: Mapping[str, Corpus], cache: Path, vocab: int, progress: Progress) -> Path:
    """The folder of the tokenizer of these texts: learnt now, or found in the cache."""
    words = cache / f"tokenizer-{vocab}-{'-'.join(c.fingerprint[:8] for c in corpora.values())}"
    if not (words / "tokenizer.json").exists():
        task = progress.add_task("learning the tokenizer", total=sum(c.train_bytes for c in corpora.values()))
        trained = train_tokenizer(texts(corpora, progress, task), vocab=vocab, template=None)
        with atomic_folder(words) as fresh:
            trained.save(fresh)
    return words


def already_tokens(source: Source, tokenizer: Tokenizer) -> tuple[Corpus, dict[str, Shard]]:
    """Megatron's token files where they lie: all of them for training, nothing held out."""
    end, vocab = tokenizer.document_end, tokenizer.vocab
    shard = open_megatron(source.where, source=source.name, document_end=end, vocab=vocab)
    nothing = {"train": frozenset(), "held_out": frozenset(), "train_bytes": 0, "held_out_bytes": 0, "skipped": ()}
    return Corpus(source=source, fingerprint=shard.sha256, python="", **nothing), {"train": shard}


def texts(corpora: Mapping[str, Corpus], progress: Progress, task) -> Iterator[str]:
    for corpus in corpora.values():
        for document in corpus.documents("train"):
            yield document.text
            progress.advance(task, len(document.text.encode()))


def bars() -> Progress:
    columns = TextColumn("{task.description:<22}"), BarColumn(20), TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(*columns, console=screen())
