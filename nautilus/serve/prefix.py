"""The tree of known prefixes: what was saved after which tokens. Letter: T tokens.

A compressed trie (radix tree): every edge holds a run of tokens, and a node stands where an entry ends or where known
sequences part. Sequences of different namespaces have different roots and never meet. Edges are int32 arrays and are
compared as a whole, so a look-up costs one vectorised comparison for each edge on its way, and reads each token once.
Nothing here recurses: a chain may be as deep as memory allows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

E = TypeVar("E")
Tokens = Sequence[int] | np.ndarray


class Node(Generic[E]):
    """A place in the tree, `depth` tokens from its root. While it has an entry it stays the same object, whatever is
    put beside it or dropped."""

    __slots__ = ("space", "edge_T", "depth", "above", "below", "entry")

    def __init__(self, space: str, edge_T: np.ndarray, above: Node[E] | None):
        self.space, self.edge_T, self.above = space, edge_T, above
        self.depth: int = len(edge_T) + (above.depth if above else 0)
        self.below: dict[int, Node[E]] = {}  # by the first token of their edges
        self.entry: E | None = None
        if above is not None:
            above.below[int(edge_T[0])] = self

    def tokens(self) -> np.ndarray:
        """All tokens from the root to here."""
        edges, node = [], self
        while node.above is not None:
            edges.append(node.edge_T)
            node = node.above
        return np.concatenate(edges[::-1])

    def shorter(self) -> Node[E] | None:
        """The deepest place above that has an entry."""
        node = self.above
        while node is not None and node.entry is None:
            node = node.above
        return node


class Match(NamedTuple, Generic[E]):
    """What the tree knows of a sequence of tokens."""

    entry: E | None  # the deepest that may be used: its tokens are a prefix of these
    length: int  # after how many tokens that is; 0 without one
    common: int  # how many tokens these begin with like anything that is stored
    beyond: E | None  # any entry that passes through those, or ends with them; None where common is 0


class PrefixTree(Generic[E]):
    """Entries by namespace and tokens; at most one for each. Iterated, it gives every entry in no particular order."""

    def __init__(self):
        self.roots: dict[str, Node[E]] = {}
        self.entries = 0

    def __len__(self) -> int:
        return self.entries

    def __iter__(self) -> Iterator[Node[E]]:
        """The places of all entries."""
        nodes = list(self.roots.values())
        while nodes:
            node = nodes.pop()
            nodes.extend(node.below.values())
            if node.entry is not None:
                yield node

    def find(self, space: str, tokens: Tokens, most: int | None = None) -> Match[E]:
        """What is known of these tokens: entries after at most `most` of them (by default after all of them) may be
        used; `common` and `beyond` know no such bound."""
        key_T = as_tokens(tokens)
        most = len(key_T) if most is None else most
        entry, length, common, last = None, 0, 0, None
        for last, common in self.walk(space, key_T):  # noqa: B007
            if last.entry is not None and last.depth == common <= most:
                entry, length = last.entry, common
        while last is not None and last.entry is None:  # every way down ends at an entry
            last = next(iter(last.below.values()))
        return Match(entry, length, common, last.entry if last is not None and common else None)

    def put(self, space: str, tokens: Tokens, entry: E) -> Node[E]:
        """Store what was saved after these tokens, in the place of what was there. Gives the place, for `drop`.

        ValueError for no tokens, and for None as an entry; TypeError, OverflowError for what is no 32-bit integer.
        """
        key_T = as_tokens(tokens)
        if not len(key_T) or entry is None:
            raise ValueError(f"{entry} was put after {len(key_T)} tokens; an entry follows at least one")
        if space not in self.roots:
            self.roots[space] = Node(space, key_T[:0], None)
        node, common = self.roots[space], 0
        for node, common in self.walk(space, key_T):  # noqa: B007
            pass
        if common < node.depth:
            node = split(node, common)
        if common < len(key_T):
            node = Node(space, key_T[common:].copy(), node)
        self.entries += node.entry is None
        node.entry = entry
        return node

    def drop(self, node: Node[E]) -> None:
        """Forget the entry of this place. ValueError if it has none, dropped before for example.

        What no longer stands where something ends or parts is joined with the edge below it.
        """
        if node.entry is None:
            raise ValueError(f"a place after {node.depth} tokens was dropped that has no entry; drop each once")
        node.entry, self.entries = None, self.entries - 1
        if not node.below and node.above is not None:
            del node.above.below[int(node.edge_T[0])]
            node = node.above
        if node.above is not None:
            if node.entry is None and len(node.below) == 1:
                join(node)
        elif not node.below:
            del self.roots[node.space]

    def walk(self, space: str, key_T: np.ndarray) -> Iterator[tuple[Node[E], int]]:
        """The nodes from the root on, each with how many tokens agree so far; in the last they may end on its edge."""
        node, common = self.roots.get(space), 0
        while node is not None:
            yield node, common
            if common < node.depth or common == len(key_T):
                return
            node = node.below.get(int(key_T[common]))
            if node is not None:
                common += agreeing(node.edge_T, key_T[common:])


def as_tokens(tokens: Tokens) -> np.ndarray:
    if isinstance(tokens, np.ndarray) and tokens.dtype == np.int32:
        return tokens
    return np.frombuffer(array("i", tokens), np.int32)  # which refuses what is no integer


def agreeing(one_T: np.ndarray, other_T: np.ndarray) -> int:
    """With how many tokens both begin."""
    length = min(len(one_T), len(other_T))
    differ_T = one_T[:length] != other_T[:length]
    first = int(differ_T.argmax()) if length else 0
    return first if length and differ_T[first] else length


def split(node: Node[E], depth: int) -> Node[E]:
    """A new node on this one's edge. The pieces are copies: a view would keep all of the edge in memory."""
    assert node.above is not None
    cut = depth - node.above.depth
    upper = Node(node.space, node.edge_T[:cut].copy(), node.above)
    node.edge_T, node.above = node.edge_T[cut:].copy(), upper
    upper.below[int(node.edge_T[0])] = node
    return upper


def join(node: Node[E]) -> None:
    """Take a node without an entry out, between the one above and the only one below."""
    (below,) = node.below.values()
    assert node.above is not None
    below.edge_T, below.above = np.concatenate([node.edge_T, below.edge_T]), node.above
    node.above.below[int(node.edge_T[0])] = below
