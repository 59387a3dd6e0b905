"""How a training is spread over devices, what a step is, and what a device is: settings, and what cannot be.

    size = pp x dp x cp x tp            the layers, the rows of a step, the tokens of a row, the heads and hidden units
    dense weights of a stage            sharded over dp x cp (FSDP), cut over tp
    experts' weights of a stage         cut over ep, which divides dp x cp x tp, and sharded over what is left of it
    replicas                            so many whole copies among dp; weights are sharded inside a copy only (HSDP)

Neighbouring devices differ in tp first, then in cp, then in ep and dp, and in pp last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, setting
from nautilus.runtime import UserError
from nautilus.train.stages import stages_at_most

MOST = 10**18  # tokens of a step, above which only a slip of the pen can be
KERNELS = ("torch", "torch_cpu", "native")
HALO = 8  # tokens of the next device that come along where rows are dealt


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Over how many devices, or processes, each thing is shared out. 1 in every place: one of them."""

    dp: int = setting(1, "processes, or groups of cp x tp of them, among which the rows of a step are dealt")
    pp: int = setting(1, "stages of neighbouring layers that a micro-batch passes, each a dp x cp x tp of processes")
    ep: int = setting(1, "processes among which the experts are dealt; divides dp x cp x tp / replicas")
    tp: int = setting(1, "processes among which heads, hidden units and words are dealt")
    cp: int = setting(1, "processes among which the tokens of a row are dealt")
    replicas: int = setting(1, "whole copies of the weights; divides dp")

    def __post_init__(self):
        refuse_all(layout_faults(self))

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Over how many devices one copy of a dense weight is sharded."""
        return self.dp * self.cp // self.replicas

    @property
    def edp(self) -> int:
        """Over how many devices one copy of an expert's weight is sharded."""
        return self.shards * self.tp // self.ep

    @property
    def least(self) -> int:
        """The fewest devices that hold one copy."""
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
    kernels: str = setting("torch", "whose activations are kept: torch (on GPUs), torch_cpu, or native (CPUs')")

    def __post_init__(self):
        if self.kernels not in KERNELS:
            raise UserError(f"machine.kernels={self.kernels!r} is none of {', '.join(KERNELS)}")
        numbers = {name: value for name, value in asdict(self).items() if name != "kernels"}
        if wrong := [f"{name}={value}" for name, value in numbers.items() if not 0 < value < math.inf]:
            raise UserError(f"machine has {', '.join(wrong)}; its numbers must be finite and above 0")


# Published peaks of dense bf16 without sparsity; links one way.
MACHINES = {
    "h100": Machine(),
    "h200": Machine(memory_gb=141.0, memory_bandwidth=4.8e12),
    "gb200": Machine(flops=2.5e15, memory_gb=186.0, memory_bandwidth=8e12, link=900e9, network=50e9, domain=72),
    "gb300": Machine(flops=2.5e15, memory_gb=279.0, memory_bandwidth=8e12, link=900e9, network=100e9, domain=72),
}


# ----- what cannot be ------------------------------------------------------------------------------------------------


def refuse(config: Config, layout: Layout, work: Work, *, now: bool = False) -> None:
    """A UserError that names every reason why the layout cannot hold this model or cut this step.

    now: to be trained at once, by this package, and not only planned.
    """
    faults = [*layer_faults(config, layout), *cut_faults(layout, work)]
    refuse_all([*faults, *(unbuilt_faults(config, layout) if now else ())])


def refuse_all(faults: Iterable[str]) -> None:
    if named := list(dict.fromkeys(faults)):
        raise UserError(f"this layout cannot be: {'; '.join(named)}")


def layout_faults(layout: Layout) -> Iterator[str]:
    small = [name for name in ("dp", "pp", "ep", "tp", "cp", "replicas") if getattr(layout, name) < 1]
    if small:
        yield f"{', '.join(f'{name}={getattr(layout, name)}' for name in small)} must be at least 1"
    elif layout.dp % layout.replicas:
        yield f"replicas={layout.replicas} does not divide dp={layout.dp}"
    elif layout.shards * layout.tp % layout.ep:
        yield (
            f"ep={layout.ep} does not divide dp x cp x tp / replicas = {layout.shards * layout.tp}: experts are dealt "
            f"among the processes of one copy; raise dp or lower ep"
        )


def layer_faults(config: Config, layout: Layout) -> Iterator[str]:
    tp, cp = layout.tp, layout.cp
    if layout.pp > (most := stages_at_most(config)):
        yield f"pp={layout.pp} stages cannot share {most} layers; give each at least one"
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


def unbuilt_faults(config: Config, layout: Layout) -> Iterator[str]:
    """What could be, with copies of groups, but not here yet."""
    for layer in (*config.layers, *config.mtp):
        match layer:
            case Attention() if layer.groups % layout.tp:
                yield f"tp={layout.tp} does not divide attention's groups={layer.groups}; copies of a group are planned"
            case Mamba() if layer.groups % layout.tp == 0 and (layer.groups // layout.tp) % layout.cp:
                groups = layer.groups // layout.tp
                yield f"cp={layout.cp} does not divide Mamba's groups/tp={groups}; copies of a group are planned"


def cut_faults(layout: Layout, work: Work) -> Iterator[str]:
    if min(work.rows, work.length, work.micro) < 1 or work.compute not in (2, 4) or work.mtp_depths < 0:
        yield f"{work} has a number that is too small, or compute bytes other than 2 and 4"
        return
    if layout.cp > 1 and (work.length % layout.cp or work.length // layout.cp < HALO):
        yield f"length={work.length} cannot be dealt among cp={layout.cp}: all get as many tokens, at least {HALO}"
    if work.micro * layout.dp > work.rows:
        yield f"micro={work.micro} rows on each of dp={layout.dp} are more than the rows={work.rows} of a step"
    if work.rows * work.length > MOST:
        yield f"rows={work.rows} of length={work.length} are more than {MOST:.0e} tokens a step"
    if work.mtp_depths >= work.length:
        yield f"mtp_depths={work.mtp_depths} tokens ahead do not lie in rows of length={work.length}"
    if work.rows % layout.dp:
        yield f"rows={work.rows} is no multiple of dp={layout.dp}"


def refuse_pieces(layout: Layout, chunk: int) -> None:
    """UserError where rows would be computed in pieces and also be dealt among processes."""
    if chunk and layout.cp > 1:
        raise UserError(
            f"chunk={chunk} computes a row piece after piece, but with layout.cp={layout.cp} a scan needs the whole "
            f"stretches of the ranks before; raise layout.cp, or set checkpointing=true, instead of chunk"
        )
