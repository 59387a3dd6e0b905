"""Which replica answers: the one for which it is least work. Letter: T tokens."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

from nautilus.serve.job import Job
from nautilus.serve.prefix import Node, PrefixTree, as_tokens

# So many tokens to read are as bad as one more request to share every step with. A long conversation goes back to where
# it is known, even if others run there; a short one rather goes where nobody is.
CROWD = 256
MOST = 1 << 22  # tokens that are remembered of each replica


class Known:
    """Prefixes that a replica has read and, by its own rules, kept: the newest, as it may have had to forget."""

    def __init__(self):
        self.tree, self.tokens = PrefixTree[int](), 0
        self.order: OrderedDict[Node[int], None] = OrderedDict()

    def held(self, job: Job) -> int:
        """Tokens that it need not read; a state that it kept is of use to prompts that begin with all of its tokens."""
        return self.tree.find(job.tenant, job.tokens, len(job.tokens) - 1).length

    def learn(self, job: Job) -> None:
        tokens_T = as_tokens(job.tokens)
        for length in sorted({*job.marks, len(tokens_T)}):
            node = self.tree.put(job.tenant, tokens_T[:length], length)
            self.tokens += node.depth * (node not in self.order)
            self.order[node] = None
            self.order.move_to_end(node)
        while self.tokens > MOST:
            node, _ = self.order.popitem(last=False)
            self.tokens -= node.depth
            self.tree.drop(node)


class Routes:
    """What went where. A replica is known by a name; a request by an id, from when it is sent until it has ended.

    cost of a replica = tokens of the prompt that it would have to read + CROWD * requests that it works at
    """

    def __init__(self):
        self.known: dict[str, Known] = {}
        self.under_way: dict[str, str] = {}

    def choose(self, id: str, job: Job, replicas: Sequence[str]) -> list[str]:
        """These replicas, the best one first; the request counts as sent there. Of equals the one that knows least."""
        self.under_way.pop(id, None)
        crowd = Counter(self.under_way.values())
        known = {name: self.known.setdefault(name, Known()) for name in replicas}
        cost = lambda name: (CROWD * crowd[name] - known[name].held(job), known[name].tokens)
        ranked = sorted(replicas, key=cost)
        self.sent(id, job, ranked[0])
        return ranked

    def nearest(self, job: Job, replicas: Sequence[str]) -> list[str]:
        """The one first that knows most of it: for what is only read in idle time, and is no load."""
        return sorted(replicas, key=lambda name: -self.known[name].held(job) if name in self.known else 0)

    def sent(self, id: str, job: Job, replica: str) -> None:
        if self.under_way.get(id) != replica:
            self.under_way[id] = replica
            self.known.setdefault(replica, Known()).learn(job)

    def ended(self, id: str) -> None:
        self.under_way.pop(id, None)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget the others: they are gone, with all they knew."""
        self.known = {name: known for name, known in self.known.items() if name in replicas}
        self.under_way = {id: name for id, name in self.under_way.items() if name in replicas}
