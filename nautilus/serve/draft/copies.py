"""Where drafts are copied from: a request's own tokens, and the latest answers to the same tenant before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from nautilus.serve.draft.suffix import MATCH, Draft, SuffixCache

TENANTS, SHARED = 32, 1 << 15  # whose answers are known, the latest tokens of each: at most 18 MB


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A draft, and whether it comes from another answer."""

    draft: Draft
    shared: bool


class Copies:
    """Of all requests that are under way, and of those before. Serving and replay draft from the same."""

    def __init__(self):
        self.own: dict[Hashable, SuffixCache] = {}  # by request
        self.shared: OrderedDict[str, SuffixCache] = OrderedDict()  # by tenant

    def draft(self, request: Hashable, tenant: str, tokens: Sequence[int], most: int) -> Copied | None:
        """At most so many tokens after these, which are all of the request so far: the draft of the higher score."""
        own = self.text(request, tokens)
        found = [Copied(draft=draft, shared=False)] if (draft := own.draft(own.tokens, most)) else []
        if tenant in self.shared and (draft := self.shared[tenant].draft(tokens[-MATCH:], most)):
            found.append(Copied(draft=draft, shared=True))
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
