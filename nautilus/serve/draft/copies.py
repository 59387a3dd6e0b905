"""Where drafts are copied from: a request's own tokens, the latest answers to the same tenant before it, and a corpus
that is known to all tenants."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from nautilus.serve.draft.suffix import MATCH, Draft, SuffixCache

TENANTS, SHARED = 32, 1 << 15  # whose answers are known, the latest tokens of each: at most 18 MB


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A draft, and where it comes from: "own", "tenant" (another answer) or "corpus"."""

    draft: Draft
    origin: str


class Copies:
    """Of all requests that are under way, and of those before. Serving and replay draft from the same. What is in the
    corpus can be told from how fast answers come, by everybody."""

    def __init__(self, corpus: SuffixCache | None = None):
        self.corpus = corpus
        self.own: dict[Hashable, SuffixCache] = {}  # by request
        self.shared: OrderedDict[str, SuffixCache] = OrderedDict()  # by tenant

    def draft(self, request: Hashable, tenant: str, tokens: Sequence[int], most: int) -> Copied | None:
        """At most so many tokens after these, which are all of the request so far: the draft of the higher score."""
        own = self.text(request, tokens)
        found = [Copied(draft=draft, origin="own")] if (draft := own.draft(own.tokens, most)) else []
        for origin, known in (("tenant", self.shared.get(tenant)), ("corpus", self.corpus)):
            if known is not None and (draft := known.draft(tokens[-MATCH:], most)):
                found.append(Copied(draft=draft, origin=origin))
        return max(found, key=lambda copied: copied.draft.score, default=None)

    def text(self, request: Hashable, tokens: Sequence[int]) -> SuffixCache:
        """The request's own text, which now has these tokens."""
        own = self.own.get(request)
        if own is None:
            own = self.own[request] = SuffixCache()
        own.extend(tokens[len(own.tokens) :])
        return own

    def finish(self, request: Hashable, tenant: str, answer: Sequence[int]) -> None:
        """The request has ended with this answer: those of its tenant that come later may copy from it."""
        self.own.pop(request, None)
        if not answer:
            return
        shared = self.shared.setdefault(tenant, SuffixCache(most=SHARED))
        self.shared.move_to_end(tenant)
        if len(self.shared) > TENANTS:
            self.shared.popitem(last=False)
        shared.begin()
        shared.extend(answer)
