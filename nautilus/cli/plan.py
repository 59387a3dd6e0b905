"""What a training costs before it is started: memory of a device, communication, time of a step. Nothing is allocated.

MODEL is a preset, a run, a checkpoint folder or a hub id. A layout that cannot be is refused with its reasons; instead
of dp, the number of devices may be given.

nautilus plan ultra gpus=2048 tp=8 pp=2 ep=128 device=gb200
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

from rich.console import Console
from rich.table import Table

from nautilus.cli.info import config_of
from nautilus.config import Based, setting, weight_count
from nautilus.config.override import asked_int
from nautilus.runtime import UserError
from nautilus.train.layout import MACHINES, Layout, Machine, Work, refuse
from nautilus.train.plan import Plan
from nautilus.train.published import PUBLISHED

DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Settings(Layout, Based):
    model: str = setting("toy", "preset, run, checkpoint folder or hub id")
    gpus: int = setting(0, "devices in all, pp x dp x cp x tp; 0: as many as those ask for")
    device: str = setting("h100", f"what machine describes: {', '.join(MACHINES)}")
    tokens: float = setting(0.0, "of the whole training; 0: the published run's, where there is one")
    work: Work = Work()
    machine: Machine = Machine()
    json: bool = setting(False, "print one JSON object instead of tables")

    def __post_init__(self):
        super().__post_init__()
        if self.gpus not in (0, self.size):
            given = f"pp={self.pp} x dp={self.dp} x cp={self.cp} x tp={self.tp}"
            raise UserError(f"gpus={self.gpus} is not {given} = {self.size}; leave one of them out, or give a multiple")
        if not 0 <= self.tokens < math.inf:
            raise UserError(f"tokens={self.tokens} of the whole training must be a finite number, 0 or more")

    @classmethod
    def base(cls, asked: Mapping[str, str]) -> Self:
        """The device's own numbers, the published batch of a published model, and dp where gpus is given instead."""
        device = asked.get("device", "h100")
        if device not in MACHINES:
            raise ValueError(f"no device {device!r}; have {', '.join(MACHINES)}, or set machine.flops and so on")
        recipe = PUBLISHED.get(asked.get("model", ""))
        work = Work() if recipe is None else Work(mtp_depths=recipe.mtp_depths, rows=recipe.rows, length=recipe.length)
        given = {name: asked_int(asked, name, 1) for name in ("gpus", "pp", "cp", "tp")}
        dp = max(given.pop("gpus") // math.prod(max(ways, 1) for ways in given.values()), 1)
        return replace(cls(), machine=MACHINES[device], work=work, dp=dp)


def main(settings: Settings) -> None:
    config = config_of(settings.model)
    refuse(config, settings, settings.work)
    facts = examine(settings, Plan(config=config, layout=settings, work=settings.work, machine=settings.machine))
    print(json.dumps(facts, indent=2)) if settings.json else show(facts)


def examine(settings: Settings, plan: Plan) -> dict:
    """Everything that is shown, as plain values."""
    layout, step = plan.layout, plan.seconds["step"]
    recipe = PUBLISHED.get(settings.model)
    tokens = settings.tokens or (recipe.tokens if recipe else 0)
    fed = plan.work.rows * plan.work.length
    memory = sum(plan.memory.values())
    return {
        "model": settings.model,
        "parameters": weight_count(plan.config),
        "layout": {"gpus": layout.size, "dp": layout.dp, "tp": layout.tp, "pp": layout.pp, "cp": layout.cp}
        | {"ep": layout.ep, "replicas": layout.replicas, "least_gpus": layout.least},
        "micro_batches": plan.microbatches,
        "memory": plan.memory | {"total": memory},
        "fits": fits(plan),
        "fits_from_gpus": None if fits(plan) else more_of_them(plan),
        "memory_gb": settings.machine.memory_gb,
        "traffic": plan.traffic,
        "seconds": plan.seconds,
        "tokens_per_s": fed / step,
        "mfu": plan.mfu,
        "tokens": tokens,
        "days": tokens / fed * step / DAY if tokens else None,
    }


def fits(plan: Plan) -> bool:
    return sum(plan.memory.values()) <= plan.machine.memory_gb * 1e9


def more_of_them(plan: Plan) -> int:
    """So many devices, with more copies of the same tp, pp, cp and ep, would hold it; 0: no number of them."""
    layout, work = plan.layout, plan.work
    while work.rows % (2 * layout.dp * work.micro) == 0:
        same = {field.name: getattr(layout, field.name) for field in fields(Layout)}
        layout = Layout(**same | {"dp": 2 * layout.dp})
        if fits(Plan(config=plan.config, layout=layout, work=work, machine=plan.machine)):
            return layout.size
    return 0


def show(facts: dict) -> None:
    console = Console(soft_wrap=True, highlight=False)
    layout = " ".join(f"{name}={value}" for name, value in facts["layout"].items())
    console.print(f"{facts['model']}: {layout}, micro-batches of a step {facts['micro_batches']}")
    for title, unit, name, scale in (
        ("Memory of the busiest device", "GB", "memory", 1e9),
        ("Sent by the busiest device in a step", "GB", "traffic", 1e9),
        ("One step", "s", "seconds", 1.0),
    ):
        table = Table("", unit, title=title)
        for part, value in facts[name].items():
            table.add_row(part, f"{value / scale:,.4g}")
        console.print(table)
    need = f"{facts['memory']['total'] / 1e9:.4g} GB"
    if not facts["fits"]:
        more = facts["fits_from_gpus"]
        cure = f"it would from gpus={more:,} on" if more else "no number of them would do; raise tp, pp, cp or ep"
        console.print(f"{need} does not fit into {facts['memory_gb']:g} GB: {cure}")
        return
    console.print(f"{need} fits into {facts['memory_gb']:g} GB")
    days = f", {facts['days']:,.1f} days for {facts['tokens']:.3g} tokens" if facts["days"] is not None else ""
    console.print(f"{facts['tokens_per_s']:,.0f} tokens/s, {facts['mfu']:.1%} of the peak{days}")
    console.print("An estimate: peaks and efficiency as in machine, data-parallel traffic hidden behind computing.")
