"""Text that answers may be copied from, whoever asks: files of a repository, schemas of tools, answers."""

from __future__ import annotations

from collections.abc import Sequence

from nautilus.data.corpus import read, sources
from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError
from nautilus.serve.draft.suffix import SuffixCache

MOST = 1 << 20  # tokens: some 300 MB, and a few seconds to go through


def corpus_of(places: Sequence[str], tokenizer: Tokenizer) -> SuffixCache:
    """Of places as `nautilus.data.corpus.sources` reads them. UserError for more than MOST tokens, and for none."""
    found = SuffixCache()
    for source in sources(places):
        for document in read(source):
            found.begin()
            found.extend(tokenizer.encode(document.text))
            if len(found.tokens) > MOST:
                raise UserError(
                    f"corpus={','.join(places)} has more than {MOST:,} tokens, all of which are kept in memory; "
                    "name the files that answers are most likely to repeat"
                )
    if not found.tokens:
        raise UserError(f"corpus={','.join(places)} has no text; name files or folders that have")
    return found
