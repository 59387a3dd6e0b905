"""What an engine drafts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nautilus.data.tokenizer import Tokenizer
from nautilus.model.eagle import Eagle, load_eagle
from nautilus.model.language import Language
from nautilus.runtime import UserError
from nautilus.serve.draft.chain import Chain, EagleHead, Head, MtpHead
from nautilus.serve.draft.corpus import corpus_of
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.measure import measure
from nautilus.serve.draft.policy import Judge, Speculation
from nautilus.serve.draft.predictor import Predictor, load_predictor
from nautilus.serve.draft.suffix import SuffixCache
from nautilus.serve.forward import Forward
from nautilus.serve.prefixes import fingerprint


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """most: tokens that are tried at once for a request; 0: none. mtp: with the model's own block, where it has one.
    eagle: a draft head in that block's place. predictor: of how much of a copied draft comes true. words: of the
    vocabulary, the first so many may be drafted by the block; 0: all. corpus: text that may be copied, too."""

    most: int = 0
    mtp: bool = True
    eagle: Eagle | None = None
    predictor: Predictor | None = None
    words: int = 32_768
    corpus: SuffixCache | None = None

    def made(self, forward: Forward, tokenizer: Tokenizer, head: Head | None) -> Speculation | None:
        """Ready for the first request: the costs are measured."""
        if not self.most:
            return None
        judge = None
        if self.predictor is not None:
            judge = Judge(predictor=self.predictor, spelling=Spelling(tokenizer))
        chain = forward.watcher = None if head is None else Chain(forward, head)
        speculation = Speculation(forward, self.most, chain, judge, self.corpus)
        measure(speculation)
        return speculation

    def head(self, model: Language) -> Head | None:
        """The block that drafts."""
        if not self.most:
            if (self.eagle, self.predictor, self.corpus) != (None, None, None):
                raise UserError("a draft head, a predictor or a corpus was given with drafts=0; give drafts=16")
            return None
        if self.eagle is not None:
            return EagleHead(self.eagle)
        return MtpHead(model, self.words or model.config.vocab) if self.mtp and model.config.mtp else None


def drafts_of(
    most: int, model: Language, tokenizer: Tokenizer, *, eagle: Path | None = None, predictor: Path | None = None,
    corpus: Sequence[str] = (),
) -> Drafts:  # fmt: skip
    """With what lies in these files. UserError for those of another model, and for damaged ones."""
    mine = {"target": fingerprint(model), "tokenizer": tokenizer.fingerprint} if predictor else {}
    return Drafts(
        most=most,
        eagle=load_eagle(eagle, model) if eagle else None,
        predictor=load_predictor(predictor, **mine) if predictor else None,
        corpus=corpus_of(corpus, tokenizer) if corpus else None,
    )
