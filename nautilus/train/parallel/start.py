"""How processes come together. Light: torch.distributed is imported where there are several."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from nautilus.config import Config
from nautilus.runtime import UserError
from nautilus.train.layout import Layout, Work, refuse
from nautilus.train.ranks import ALONE, Ranks


def start(layout: Layout, config: Config, work: Work) -> Ranks:
    """Joins the processes that `torchrun` started, or has it start them and this same command in each. A layout of one
    needs none.

    layout.dp=1 in a larger world means: as many as there are. UserError where the layout does not fit the world, the
    model or a step.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if layout.dp == 1 and layout.size < world and world % layout.size == 0:
        layout = replace(layout, dp=world // layout.size)
    refuse(config, layout, work, now=True)
    if "WORLD_SIZE" not in os.environ and layout.size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.size)]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "nautilus", *sys.argv[1:]])
    if world == 1 and layout.size == 1:
        return ALONE
    if layout.size != world:
        raise UserError(
            f"the layout pp={layout.pp} x dp={layout.dp} x cp={layout.cp} x tp={layout.tp} is of {layout.size} "
            f"processes but {world} were started; start it with torchrun --nproc-per-node {layout.size}, or change "
            f"the layout"
        )
    from nautilus.train.parallel.many import join  # two seconds that a single process need not wait

    return join(layout, work)
