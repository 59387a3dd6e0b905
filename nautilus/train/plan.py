"""What a training costs on a layout of devices, before it is started: memory, communication, time of a step.

Parameters, gradients and optimiser are counted tensor by tensor on the real model, built without memory. Activations
are what native kernels, or where the machine has none PyTorch's, keep for the backward, as formulas per token
(`kept.py`). `tests/train/test_plan.py` compares all of it with what a training on this machine holds.

The layout, as in Megatron-LM: pipeline stages (pp) of neighbouring layers; inside a stage the dense parts are split
by tensor (tp), context (cp) and data (dp), and the experts by expert (ep) over the same devices. Tensor parallelism
splits the tokens outside matrices, too (sequence parallel). Weights are float32 masters; each tensor lies spread over
the devices of one of `replicas` copies and is gathered, in the compute dtype, when its layer runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from nautilus.config import Attention, Config, Experts, Layer, Mamba, weight_count
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.ops.loss import ELEMENTS, HELD
from nautilus.ops.precision import compute_dtype
from nautilus.runtime import UserError
from nautilus.train.kept import kept_at_the_ends, kept_by
from nautilus.train.layout import Layout, Machine, Work
from nautilus.train.stages import copies_embedding, end_flops, layer_flops, stages_of

MASTER, GRADIENT, MOMENTS = 4, 4, 8  # bytes of an element: float32
EXPERT_WEIGHTS = ("up_proj", "down_proj", "gate_proj")


@dataclass(frozen=True)
class Piece:
    """One tensor of the model: how many elements a device computes with, and how many it holds."""

    stage: int
    layer: str
    used: int
    held: int
    expert: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every figure is of the busiest device. A layout that `layout.refuse` accepts is taken for granted."""

    config: Config
    layout: Layout = Layout()
    work: Work = Work()
    machine: Machine = field(default_factory=Machine)

    @cached_property
    def stages(self) -> list[int]:
        """The stage of each layer."""
        return stages_of(self.config, self.layout.pp, length=self.work.length, depths=self.work.mtp_depths)

    @cached_property
    def pieces(self) -> list[Piece]:
        model = Language(self.config, device="meta")
        found = [self.piece(name, p) for name, p in model.named_parameters()]
        return [*found, *(replace(piece, stage=self.layout.pp - 1) for piece in found if self.copied(piece))]

    def copied(self, piece: Piece) -> bool:
        """Whether the last stage has a copy of it."""
        embedding = piece.layer == "backbone.embeddings.weight"
        return embedding and copies_embedding(self.config, self.layout.pp, self.work.mtp_depths)

    def piece(self, name: str, parameter: torch.Tensor) -> Piece:
        layout, parts = self.layout, name.split(".")
        inside = parts[:2] == ["backbone", "layers"]
        index = int(parts[2]) if inside else -1
        stage = self.stages[index] if inside else 0 if "embeddings" in name else layout.pp - 1
        expert = parts[-2] == "experts" and parts[-1] in EXPERT_WEIGHTS
        layer = self.config.layers[index] if inside else None
        if not inside and parts[0] == "mtp":
            layer = self.config.mtp[int(parts[2])]
        ways = layout.ep if expert else self.split(name, layer)
        used = -(-parameter.numel() // ways)
        return Piece(stage, ".".join(parts[:3]), used, -(-used // self.shards(expert)), expert)

    def shards(self, expert: bool) -> int:
        """Over how many devices of one copy a tensor that they all compute with lies spread."""
        return self.layout.edp if expert else self.layout.shards

    def split(self, name: str, layer: Layer | None) -> int:
        """Ways that tensor parallelism splits a dense tensor; norms, routers and latent projections are not split."""
        tp = self.layout.tp
        if "embeddings" in name or "lm_head" in name:
            return tp
        if isinstance(layer, Attention) and name.endswith(("k_proj.weight", "v_proj.weight")):
            return min(tp, layer.groups)
        whole = (".gate.", "latent_proj", "eh_proj", "enorm", "hnorm", "layernorm", "q_norm", "k_norm")
        if "mixer" not in name or any(word in name for word in whole):
            return 1
        return tp

    @property
    def microbatches(self) -> int:
        return -(-self.work.rows // (self.layout.dp * self.work.micro))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.work.micro * self.work.length // self.layout.cp

    # memory

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes by what they are for, on the device that needs most."""
        return max((self.memory_of(stage) for stage in range(self.layout.pp)), key=lambda parts: sum(parts.values()))

    def memory_of(self, stage: int) -> dict[str, int]:
        mine = [piece for piece in self.pieces if piece.stage == stage]
        held = sum(piece.held for piece in mine)
        return {
            "weights": MASTER * held,
            "gradients": GRADIENT * held,
            "optimizer": MOMENTS * held + 4 * len(mine),
            "gathered": self.gathered(mine),
            "activations": self.activations(stage),
            "loss": self.loss_space() if stage == self.layout.pp - 1 else 0,
        }

    def gathered(self, mine: list[Piece]) -> int:
        """Copies that the running layer computes with: one in the compute dtype, and a second one on its way."""
        spread = any(piece.held < piece.used for piece in mine)
        if self.work.compute == MASTER and not spread:
            return 0
        sizes: dict[str, int] = {}
        for piece in mine:
            sizes[piece.layer] = sizes.get(piece.layer, 0) + piece.used
        return (2 if spread else 1) * self.work.compute * max(sizes.values(), default=0) + self.gathered_keys()

    def gathered_keys(self) -> int:
        """Keys and values of the whole row, which the running attention layer sees under context parallelism."""
        layers = [layer for layer in self.config.layers if isinstance(layer, Attention)]
        if self.layout.cp == 1 or not layers:
            return 0
        widest = max(max(layer.groups // self.layout.tp, 1) * layer.head_width for layer in layers)
        return 2 * widest * self.work.length * self.work.micro * self.work.compute

    def activations(self, stage: int) -> int:
        """Of all micro-batches that are under way in this stage (1F1B: as many as stages come after, and itself)."""
        config, work, layout = self.config, self.work, self.layout
        kept = self.kept([layer for layer, own in zip(config.layers, self.stages, strict=True) if own == stage])
        last = stage == layout.pp - 1
        whole = sum(self.kept(config.mtp * work.mtp_depths)) if last else 0.0  # the block is never computed again
        ends = kept_at_the_ends(config, work.compute, work.mtp_depths) if last else 8
        flying, tokens = min(layout.pp - stage, self.microbatches), self.tokens / layout.tp
        copies = self.rounded(stage)
        if work.checkpointing:
            entering = len(kept) * config.width * work.compute
            return math.ceil(flying * (tokens * (entering + whole + ends) + copies) + tokens * max(kept, default=0))
        return math.ceil(flying * (tokens * (sum(kept) + whole + ends) + copies))

    def kept(self, layers: Iterable[Layer]) -> list[float]:
        """Bytes per token of each layer."""
        how = {"kernels": self.machine.kernels, "ranks": self.layout.tp}
        return [kept_by(copied_groups(e, self.layout.tp), self.config.width, self.work, **how) for e in layers]

    def rounded(self, stage: int) -> int:
        """Copies of matrices in a narrower compute dtype, which PyTorch keeps from each forward to its backward."""
        if self.machine.kernels == "native" or self.work.compute == MASTER:
            return 0
        passes = {"backbone": int(not self.work.checkpointing), "mtp": self.work.mtp_depths}
        mine = [piece for piece in self.pieces if piece.stage == stage and ".layers." in piece.layer]
        return self.work.compute * sum(passes[piece.layer.split(".")[0]] * piece.used for piece in mine)

    def loss_space(self) -> int:
        """The head's gradient, and the logits that are held at a time."""
        vocab = self.config.vocab // self.layout.tp
        logits = min(HELD, self.tokens * vocab) * self.work.compute + 3 * 4 * min(max(ELEMENTS, 16 * vocab), HELD)
        return 4 * vocab * self.config.width + logits

    # work and communication

    @cached_property
    def flops(self) -> float:
        """Of one step over all devices, without what checkpointing computes again."""
        config, work = self.config, self.work
        per_token = sum(layer_flops(layer, config.width, work.length) for layer in config.layers)
        per_token += end_flops(config, work.length, work.mtp_depths)
        return per_token * work.rows * work.length

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes that the busiest device sends in a step, by axis."""
        return {axis: max(values) for axis, values in zip_traffic(self.traffic_of(s) for s in range(self.layout.pp))}

    def traffic_of(self, stage: int) -> dict[str, float]:
        layout, work, width = self.layout, self.work, self.config.width
        mine = [layer for layer, own in zip(self.config.layers, self.stages, strict=True) if own == stage]
        mine += self.config.mtp * work.mtp_depths if stage == layout.pp - 1 else ()
        tokens, m, a = self.tokens, self.microbatches, work.compute
        passes = 3 if work.checkpointing else 2  # forward, again, backward
        tensor = 2 * tokens * (passes * width * a * len(mine) + self.words_sent(stage)) * away(layout.tp)
        expert = sum(2 * passes * tokens * e.active * (e.latent or width) * a for e in mine if isinstance(e, Experts))
        context = sum(passes * tokens * a * exchanged(layer) for layer in mine) / layout.tp * away(layout.cp)
        pipeline = 2 * tokens * width * a / layout.tp if layout.pp > 1 else 0.0
        sent: dict[str, float] = {
            "tp": m * tensor,
            "ep": m * expert / layout.tp * away(layout.ep),
            "cp": m * context,
            "pp": m * pipeline + GRADIENT * self.doubled(stage),
            "dp": self.data_traffic([piece for piece in self.pieces if piece.stage == stage]),
        }
        return sent

    def words_sent(self, stage: int) -> int:
        """Bytes per token that ranks add up because each has some of the words: what the embedding gives, the gradient
        of what the head reads, and three numbers of each logarithm of a probability."""
        depths, vector = self.work.mtp_depths, self.config.width * self.work.compute
        heads = 1 + depths if stage == self.layout.pp - 1 else 0
        return ((stage == 0) + (heads > 1)) * vector + heads * (vector + 3 * 4)

    def doubled(self, stage: int) -> int:
        """Elements that the first and the last stage both hold, and whose gradients they add up."""
        ends = stage in (0, self.layout.pp - 1)
        return sum(piece.held for piece in self.pieces if piece.stage == stage and ends and self.copied(piece))

    def data_traffic(self, mine: list[Piece]) -> float:
        """Gradients are added up once a step in float32, inside a copy and then over the copies; spread weights are
        gathered for every pass."""
        total, gathers = 0.0, 2 * self.microbatches * self.work.compute
        for expert in (False, True):
            used, shards = sum(piece.used for piece in mine if piece.expert == expert), self.shards(expert)
            total += used * (GRADIENT + gathers) * away(shards)
            total += used / shards * 2 * GRADIENT * away(self.layout.replicas)
        return total

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of one step. Data-parallel traffic hides behind computing; the other axes do not."""
        machine, layout = self.machine, self.layout
        again = 4 / 3 if self.work.checkpointing else 1.0
        computing = self.flops * again / layout.size / (machine.flops * machine.efficiency)
        spans = {"tp": layout.tp, "cp": layout.tp * layout.cp, "ep": layout.ep, "pp": layout.size, "dp": layout.size}
        moving = {
            axis: sent / (machine.link if spans[axis] <= machine.domain else machine.network)
            for axis, sent in self.traffic.items()
        }
        exposed = sum(moving[axis] for axis in ("tp", "cp", "ep", "pp"))
        bubble = (computing + exposed) * (layout.pp - 1) / self.microbatches
        held = self.memory["weights"] + self.memory["gradients"] + 2 * self.memory["optimizer"]
        update = (held + self.memory["weights"]) / machine.memory_bandwidth
        waiting = max(0.0, moving["dp"] - computing)
        parts: dict[str, float] = {
            "computing": computing,
            "exchange": exposed,
            "bubble": bubble,
            "waiting": waiting,
            "update": update,
        }
        return parts | {"step": sum(parts.values())}

    @property
    def mfu(self) -> float:
        """The usual measure: 6 FLOPs per active weight and token."""
        useful = 6 * weight_count(self.config)["active"] * self.work.rows * self.work.length
        return useful / self.seconds["step"] / self.layout.size / self.machine.flops


def plan_of(settings, ways: int) -> Plan:
    """What a training with the settings of `nautilus pretrain` holds at least, its rows dealt `ways` ways. Of rows
    computed in pieces it counts one piece."""
    work = Work(
        rows=settings.rows,
        length=min(settings.chunk or settings.length, settings.length),
        micro=min(settings.micro or settings.rows, settings.rows // ways),
        compute=compute_dtype(settings.compute).itemsize,
        checkpointing=settings.checkpointing,
        mtp_depths=settings.mtp_depths,
    )
    machine = Machine(kernels="torch_cpu" if native().functions is None else "native")
    return Plan(config=settings.model, layout=replace(settings.layout, dp=ways), work=work, machine=machine)


def refuse_too_large(plan: Plan, has: int) -> None:
    """UserError where one process would need more than `has` bytes: by the plan, and for the rows of a step."""
    work = plan.work
    parts = plan.memory | {"rows": 16 * work.rows * work.length // plan.layout.dp}  # their tokens and weights
    if (need := sum(parts.values())) > has:
        largest = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items() if size > need / 20)
        raise UserError(
            f"rows={work.rows} of length={work.length} in micro-batches of {work.micro} need {need / 1e9:,.1f} GB of"
            f" memory ({largest}), here are {has / 1e9:,.1f}; give fewer or shorter rows, a smaller micro=, a smaller"
            f" model, or checkpointing=true"
        )


def copied_groups(layer: Layer, tp: int) -> Layer:
    """The layer with at least one group of keys and values for each tensor-parallel rank."""
    return replace(layer, groups=max(layer.groups, tp)) if isinstance(layer, Attention) else layer


def away(ways: int) -> float:
    """The share of something spread over so many devices that lies on the others."""
    return (ways - 1) / ways


def exchanged(layer: Layer) -> int:
    """Elements per token that context parallelism moves in one pass through a layer."""
    match layer:
        case Mamba():  # all heads of a part of the row become a part of the heads of the whole row, and back
            return 2 * layer.inner + layer.conv_width + layer.heads
        case Attention():  # keys and values are gathered
            return 2 * layer.groups * layer.head_width
    return 0


def zip_traffic(stages):
    found = list(stages)
    return [(axis, [one[axis] for one in found]) for axis in found[0]]
