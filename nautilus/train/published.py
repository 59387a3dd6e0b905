"""How the published models were trained, number by number, and the same run at any size.

Every number has its source: the report of its model (Nano arXiv 2512.20848, Super 2604.12374, Ultra 2606.15007), the
white paper [WP] 2512.20856, the recipes [MB] of NVIDIA-NeMo/Megatron-Bridge, the code [MLM] of NVIDIA/Megatron-LM, or
arithmetic on those [DER]. [?] marks what no report says. Reports count where recipes disagree with them.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from nautilus.config import PrecisionTable
from nautilus.train.optim import OptimConfig

TRILLION, BILLION = 10**12, 10**9
MEGA = 1 << 20
RECIPES = "[MB]"


@dataclass(frozen=True, kw_only=True)
class Long:
    """Training that goes on at a constant rate with longer rows.

    `lengths` are (tokens of a row, share of the tokens); `mixing` as in `data.lengths`. batch: tokens of an update.
    parallel: how it was laid out.
    """

    tokens: int
    lr: float
    lengths: tuple[tuple[int, float], ...]
    mixing: str
    batch: int
    parallel: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """One main run. Spans are in tokens: `warmup`, `decay` (the last ones), `border` between the two blends of text,
    `merge_every` between checkpoints to average, `merge_window` behind the released base (0: not averaged). `reset`:
    whether each document of a row starts afresh, or all are one text. `precision`: what `PrecisionTable` calls
    `format`, the last `bf16_tail` of all `layers` being in bf16."""

    tokens: int
    layers: int
    border: int
    length: int = 8192
    rows: int = 3072
    lr: float
    min_lr: float
    warmup: int
    decay: int
    shape: str = "minus_sqrt"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    init_std: float
    balance: float = 1e-3
    aux_weight: float = 1e-4
    mtp_depths: int = 2
    mtp_weight: float = 0.3
    merge_every: int = 0
    merge_window: int = 0
    merge_windows: tuple[int, ...] = ()
    reset: bool = False
    precision: str = "nvfp4"
    bf16_tail: int = 0
    long: tuple[Long, ...]
    source: str
    sources: dict[str, str]

    @property
    def batch(self) -> int:
        """Tokens of an update."""
        return self.rows * self.length

    @property
    def steps(self) -> int:
        return round(self.tokens / self.batch)

    def source_of(self, name: str) -> str:
        """Where a number comes from, with [?] where that is no report."""
        return self.sources.get(name, self.source)

    def updates(self, span: int, steps: int) -> int:
        """So many tokens of the published run as updates of one of `steps` updates."""
        return round(span / self.tokens * steps)

    def optim(self, steps: int) -> OptimConfig:
        """The optimiser of a run of `steps` updates, warm-up and decay having their shares of it."""
        same = {name: getattr(self, name) for name in ("lr", "min_lr", "shape", "betas", "eps", "weight_decay", "clip")}
        return OptimConfig(warmup=self.updates(self.warmup, steps), decay=self.decay / self.tokens, **same)

    def settings(self, steps: int, layers: int) -> dict[str, Any]:
        """Settings of `nautilus pretrain` for a run of `steps` updates of any size on a model of so many layers."""
        same = {name: getattr(self, name) for name in ("balance", "aux_weight", "mtp_depths", "mtp_weight", "reset")}
        run = {"steps": steps, "optim": self.optim(steps), "precision": self.table(layers)}
        return same | run | self.merge(steps)

    def table(self, layers: int) -> PrecisionTable:
        """The formats by role at any depth: the published share of the last layers, rounded up, stays in bf16."""
        if self.precision == "bf16":
            return PrecisionTable()
        return PrecisionTable(format=self.precision, last_layers=-(-layers * self.bf16_tail // self.layers))

    def merge(self, steps: int) -> dict[str, int]:
        """As many snapshots over the same share of the run as the released base is made of; fewer if it is short."""
        window = self.updates(self.merge_window, steps)
        if window < 2:
            return {"average": 0}
        every = max(1, self.updates(self.merge_every, steps))
        return {"average": window // every, "average_every": every}

    def long_settings(self, stage: int, *, steps: int, length: int, rate: float) -> dict[str, Any]:
        """Settings of the long-context phase after a run of `steps` updates of rows of `length` that ended at `rate`.

        Lengths keep their ratio to the main run's, and the phase its share of the tokens.
        """
        long = self.long[stage]
        scaled = [(max(2, round(own * length / self.length)), share) for own, share in long.lengths]
        return {
            "steps": max(1, self.updates(long.tokens, steps)),
            "lengths": tuple(f"{share:g}*{own}" for own, share in scaled),
            "mixing": long.mixing,
            "average": 0,
            "optim": dataclasses.replace(self.optim(steps), lr=rate, min_lr=rate, warmup=0, decay=0.0),
        }


COMMON = {
    "eps": f"{RECIPES} [?]",
    "clip": f"{RECIPES} [?]",
    "init_std": RECIPES,
    "reset": f"{RECIPES} [?]",
    "steps": "[DER]",
}
MERGES = tuple(billions * BILLION for billions in (125, 250, 500))

PUBLISHED = {
    "nano": Published(
        tokens=25 * TRILLION,
        layers=52,
        border=23_500 * BILLION,
        lr=1e-3,
        min_lr=1e-5,
        warmup=8_400_000_000,
        decay=5 * TRILLION,
        init_std=0.0173,
        mtp_depths=0,
        mtp_weight=0.0,
        precision="bf16",
        long=(
            Long(
                tokens=121 * BILLION,
                lr=1e-5,
                lengths=((MEGA // 2, 0.5), (4096, 0.5)),
                mixing="together",
                batch=48 * MEGA // 2,
                parallel="CP8 TP8 EP8 PP4, H100",
                source="2512.20848; shares of the two lengths not stated [?]",
            ),
        ),
        source="2512.20848",
        sources=COMMON | {"shape": "not stated [?]; minus_sqrt is the default of [MB]"},
    ),
    "super": Published(
        tokens=25 * TRILLION,
        layers=88,
        border=20 * TRILLION,
        lr=4.5e-4,
        min_lr=4.5e-6,
        warmup=200 * BILLION,
        decay=5 * TRILLION,
        init_std=0.014,
        merge_every=25 * BILLION,
        merge_window=500 * BILLION,
        merge_windows=MERGES,
        bf16_tail=14,
        long=(
            Long(
                tokens=34 * BILLION,
                lr=4.5e-6,
                lengths=((MEGA, 1.0),),
                mixing="turns",
                batch=16 * MEGA,
                parallel="CP64 TP2 EP64, GB200",
                source="2604.12374",
            ),
            Long(
                tokens=17 * BILLION,
                lr=4.5e-6,
                lengths=((MEGA, 0.5), (4096, 0.5)),
                mixing="turns",
                batch=16 * MEGA,
                parallel="CP64 TP2 EP64, GB200",
                source="2604.12374; that both lengths have equal shares [?]",
            ),
        ),
        source="2604.12374",
        sources=COMMON | {"bf16_tail": "[DER] of 'last 15 %'"},
    ),
    "ultra": Published(
        tokens=20 * TRILLION,
        layers=108,
        border=15 * TRILLION,
        lr=2.5e-4,
        min_lr=2.5e-6,
        warmup=200 * BILLION,
        decay=5 * TRILLION,
        init_std=0.0099,
        mtp_weight=0.1,
        merge_every=25 * BILLION,
        merge_window=500 * BILLION,
        merge_windows=(*MERGES, TRILLION),
        bf16_tail=16,
        long=(
            Long(
                tokens=33 * BILLION,
                lr=2.5e-6,
                lengths=((MEGA, 0.92), (4096, 0.08)),
                mixing="turns",
                batch=24 * MEGA,
                parallel="CP32 TP8 EP128 PP2, GB200",
                source="2606.15007",
            ),
        ),
        source="2606.15007",
        sources=COMMON
        | {
            "rows": "2606.15007, 'all else as Super'",
            "init_std": f"{RECIPES}, GB200 and GB300; the H100 one has 0.014 [?]",
            "merge_every": "2604.12374 [?]",
        },
    ),
}
# The name of each phase of a published run: super is the main run, super_long and super_mixed what came after.
LATER = {"nano_long": ("nano", 0), "super_long": ("super", 0), "super_mixed": ("super", 1), "ultra_long": ("ultra", 0)}


def published(name: str) -> Published:
    if name not in PUBLISHED:
        names = [*PUBLISHED, *LATER]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? Have" if near else "have"
        raise ValueError(f"no recipe {name!r}; {hint} {', '.join(names)}")
    return PUBLISHED[name]
