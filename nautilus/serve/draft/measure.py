"""What passes and drafts cost here, measured before the first request, at the beginning of a text and far behind it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from nautilus.serve.draft.policy import Speculation
from nautilus.serve.draft.proposal import DEEPEST
from nautilus.serve.forward import Forward
from nautilus.serve.memory import Berth
from nautilus.serve.seen import Seen

log = logging.getLogger("nautilus.serve")
SIZES = (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33)  # tokens of passes that are measured
FAR, NEAR = 4096, 512  # tokens before a pass that is measured far behind the beginning, and fewest of them


def measure(speculation: Speculation) -> None:
    """Of a block, also each more token of a draft. An engine of very short requests has no room for it: it drafts
    nothing."""
    sizes = [size for size in SIZES if size <= 1 + speculation.most]
    berths, room = speculation.forward.berths, sizes[-1] + DEEPEST
    far = max(0, min(FAR, berths.max_tokens - room))
    berth = berths.take(room + far)
    if berth is None:  # of requests so short that nothing is lost
        log.warning("an engine of so few tokens has no room to time what drafts cost; none are made")
        return
    try:
        speculation.costs.measure(sizes, passes(speculation.forward, berth))
        if speculation.chain is not None:
            most = min(speculation.most, DEEPEST)
            speculation.catching = speculation.chain.measure(speculation.drafting, berth, most)
        if far >= NEAR and len(sizes) > 1:
            speculation.costs.measure_context(far, sizes[-1], passes(speculation.forward, berth, far))
    finally:
        berths.give_back(berth)


def passes(forward: Forward, berth: Berth, before: int = 0) -> Callable[[int], None]:
    """A pass over so many tokens after `before` others, of which nothing stays."""
    draw, vocab = random.Random(0), forward.model.config.vocab

    def run(size: int) -> None:
        tokens = [draw.randrange(vocab) for _ in range(size)]
        berth.length = before
        if size == 1:
            forward.step([berth], tokens)
        else:
            forward.attempt([berth], [tokens])
            forward.accept([berth], [0])
        berth.length, berth.behind = 0, Seen()

    return run
