"""How a training may be spread over devices, what a step is, and what a device is: settings, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nautilus.config import Attention, Config, Experts, Mamba, Mlp
from nautilus.runtime import UserError
from nautilus.train.optim import setting


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is spread. 1 in every place: one device."""

    gpus: int = setting(1, "devices in all")
    tp: int = setting(1, "ways that matrices are split")
    pp: int = setting(1, "pipeline stages")
    cp: int = setting(1, "ways that a row is split")
    ep: int = setting(1, "ways that the experts are spread")
    shard: str = setting("full", "full: weights, gradients, moments lie spread over their copies; none: each has all")

    @property
    def dp(self) -> int:
        return self.gpus // (self.pp * self.tp * self.cp)

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.gpus // (self.pp * self.ep)

    @property
    def least(self) -> int:
        return self.pp * max(self.tp * self.cp, self.ep)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One step."""

    rows: int = setting(3072, "rows of a step")
    length: int = setting(8192, "tokens of a row")
    micro: int = setting(1, "rows of a micro-batch on each data-parallel rank")
    compute: int = setting(2, "bytes of an activation: 2 bf16, 4 fp32")
    checkpointing: bool = setting(True, "keep what enters a layer and compute the rest again in the backward")
    mtp_depths: int = setting(0, "tokens ahead that the prediction block learns")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and what joins it to others. `efficiency` is the share of its peak that matrix products reach."""

    flops: float = setting(989e12, "peak FLOP/s of a device in the compute dtype")
    efficiency: float = setting(0.4, "share of that peak which large products reach")
    memory_gb: float = setting(80.0, "memory of a device")
    memory_bandwidth: float = setting(3.35e12, "bytes/s of that memory")
    link: float = setting(450e9, "bytes/s between devices of a domain, each way")
    network: float = setting(50e9, "bytes/s of a device between domains")
    domain: int = setting(8, "devices of a domain")


# Published peaks of dense bf16 without sparsity; links one way.
MACHINES = {
    "h100": Machine(),
    "h200": Machine(memory_gb=141.0, memory_bandwidth=4.8e12),
    "gb200": Machine(flops=2.5e15, memory_gb=186.0, memory_bandwidth=8e12, link=900e9, network=50e9, domain=72),
    "gb300": Machine(flops=2.5e15, memory_gb=279.0, memory_bandwidth=8e12, link=900e9, network=100e9, domain=72),
}


# ----- what cannot be ------------------------------------------------------------------------------------------------


def refuse(config: Config, layout: Layout, work: Work) -> None:
    """A UserError that names every reason why the layout cannot hold this model or cut this step."""
    if faults := [*layout_faults(layout), *layer_faults(config, layout), *cut_faults(layout, work)]:
        raise UserError(f"this layout cannot be: {'; '.join(dict.fromkeys(faults))}")


def layout_faults(layout: Layout) -> Iterator[str]:
    small = [name for name in ("gpus", "tp", "pp", "cp", "ep") if getattr(layout, name) < 1]
    if small:
        yield f"{', '.join(small)} must be at least 1"
        return
    if layout.shard not in ("full", "none"):
        yield f"shard={layout.shard!r} is neither full nor none"
    if layout.gpus < layout.least:
        yield f"gpus={layout.gpus} is below pp*max(tp*cp, ep)={layout.least}"
    elif layout.gpus % (layout.pp * layout.tp * layout.cp):
        yield f"gpus={layout.gpus} is no multiple of pp*tp*cp={layout.pp * layout.tp * layout.cp}"
    elif layout.gpus % (layout.pp * layout.ep):
        yield f"gpus={layout.gpus} is no multiple of pp*ep={layout.pp * layout.ep}"


def layer_faults(config: Config, layout: Layout) -> Iterator[str]:
    tp, cp = max(layout.tp, 1), max(layout.cp, 1)
    if layout.pp > len(config.layers):
        yield f"pp={layout.pp} stages cannot share {len(config.layers)} layers"
    if config.vocab % tp:
        yield f"tp={tp} does not divide vocab={config.vocab}"
    if layout.ep > 1 and not any(isinstance(layer, Experts) for layer in (*config.layers, *config.mtp)):
        yield f"ep={layout.ep} but no layer has experts"
    for layer in (*config.layers, *config.mtp):
        match layer:
            case Mamba() if layer.heads % tp or layer.groups % tp:
                yield f"tp={tp} does not divide Mamba's heads={layer.heads} and groups={layer.groups}"
            case Mamba() if (layer.heads // tp) % cp:
                yield f"cp={cp} does not divide Mamba's heads/tp={layer.heads // tp}, which bounds it"
            case Attention() if layer.heads % tp or (layer.groups % tp and tp % layer.groups):
                yield f"tp={tp} goes into attention's heads={layer.heads}, groups={layer.groups} unevenly"
            case Experts() if layer.experts % layout.ep:
                yield f"ep={layout.ep} does not divide experts={layer.experts}"
            case Experts() if layer.shared % tp:
                yield f"tp={tp} does not divide the shared expert's width {layer.shared}"
            case Mlp() if layer.hidden % tp:
                yield f"tp={tp} does not divide the MLP's width {layer.hidden}"


def cut_faults(layout: Layout, work: Work) -> Iterator[str]:
    if min(work.rows, work.length, work.micro) < 1 or work.compute not in (2, 4) or work.mtp_depths < 0:
        yield f"{work} has a number that is too small, or compute bytes other than 2 and 4"
        return
    halves = 2 * layout.cp if layout.cp > 1 else 1
    if work.length % (halves * layout.tp):
        yield f"length={work.length} is no multiple of 2*cp*tp={halves * layout.tp}, two pieces a rank"
    if layout.dp and work.rows % (layout.dp * work.micro):
        yield f"rows={work.rows} is no multiple of dp*micro={layout.dp}*{work.micro}"
