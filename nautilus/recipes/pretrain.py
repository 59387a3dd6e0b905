"""Train a model from plain text: tokenizer, packed rows, AdamW under a warm-up, stable, decay schedule, report.

MODEL is a preset, such as toy or super (a wrong name lists them); its sizes are settings too: model.width=384
model.layers.E.active=2. The same command again goes on where an interrupted run stopped, and with more steps beyond its
end. The output folder opens with `nautilus chat` and `nautilus.load`. With layout.dp=4 and the like it trains on as
many processes; `torchrun --nproc-per-node 4 -m nautilus pretrain …` starts them elsewhere.

recipe=super steps=2000         the published numbers, warm-up and decay having their shares of the steps
from=runs/a                     a new phase after runs/a, with its settings, at the rate it ended with
from=runs/a recipe=super_long   the published long-context phase after it: longer rows, so many steps
from=runs/a anneal=200          its training goes on, the rate falling at once over 200 updates
from=folder/of/a/release        a new run on the weights of a checkpoint folder or hub id, with its tokenizer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from nautilus.config import Config, PrecisionTable, setting
from nautilus.data.blend import read_blend, sources_of
from nautilus.data.mix import Stream
from nautilus.data.prepare import Prepared, prepare
from nautilus.data.turns import Turns, rows_of_lengths
from nautilus.eval.examine import examine, talk
from nautilus.eval.loss import HeldOut
from nautilus.eval.material import Sample
from nautilus.model.language import Language
from nautilus.model.lower import lower
from nautilus.ops.precision import compute_dtype
from nautilus.presets import toy
from nautilus.runtime import Run, UserError, keep_memory
from nautilus.serve.memory import memory_bytes
from nautilus.train.average import average_checkpoints
from nautilus.train.checkpoint import snapshots
from nautilus.train.continuing import Following, begin, checkpoints, open_run
from nautilus.train.layout import Layout, Work, refuse_pieces
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain as objective
from nautilus.train.optim import adamw, schedule
from nautilus.train.parallel import start
from nautilus.train.plan import plan_of, refuse_too_large
from nautilus.train.ranks import Ranks

LEAST = {"steps": 1, "rows": 1, "length": 2, "micro": 0, "chunk": 0, "mtp_depths": 0, "average": 0, "average_every": 1}
LARGEST = 1e38  # a float32 holds it
LEAST |= {"save_every": 0, "mtp_weight": 0, "aux_weight": 0, "balance": 0}


@dataclass(frozen=True, kw_only=True)
class Settings(Following):
    model: Config = setting(toy(), "a preset, or sizes: model.width=384, model.layers=MEM*E, model.layers.E.active=2")
    data: tuple[str, ...] = setting(("embedded",), "text: [weight*]place[#field]; embedded, paths, hub:owner/name")
    blend: Path | None = setting(None, "file of sources and their shares by phase, in place of data")
    undecodable: str = setting("error", "text that is not UTF-8: error, skip or replace")
    max_bytes: int = setting(0, "of each source, 0: all")
    rows: int = setting(16, "rows of a step")
    micro: int = setting(0, "rows of a micro-batch, 0: all of them")
    reset: bool = setting(True, "documents of a row do not see each other; false: one running text")
    seed: int = setting(0, "of the initial weights and the order of the text")
    compute: str = setting("auto", "bf16 or fp32 activations; auto: what is faster here")
    precision: PrecisionTable = PrecisionTable()
    layout: Layout = Layout()
    checkpointing: bool = setting(False, "compute layers again in the backward instead of keeping what it needs")
    chunk: int = setting(0, "tokens of a row that a layer computes at a time, so that rows may be long; 0: all")
    mtp_depths: int = setting(2, "tokens ahead that the multi-token-prediction block learns; 0 for a model without one")
    mtp_weight: float = setting(0.3, "of the losses of those tokens, over the depths")
    aux_weight: float = setting(1e-4, "of the sequence balance loss")
    balance: float = setting(1e-3, "step of the load-balancing biases")
    prompts: tuple[str, ...] = setting(("def main(",), "texts that the report shows continued")

    def __post_init__(self):
        for name, least in LEAST.items():
            if not least <= getattr(self, name) < LARGEST:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least} and below {LARGEST:g}")
        super().__post_init__()
        refuse_pieces(self.layout, self.chunk)
        compute_dtype(self.compute)


def main(settings: Settings) -> None:
    run, scores, _ = pretrain(settings)
    say = Console(soft_wrap=True, highlight=False).print
    if scores is None:
        say("no text was held out: the sources are too small")
    else:
        model, xz = scores.total.bits_per_byte, scores.total.xz_bits_per_byte
        say(f"held-out bits per byte {model:.4f}; xz -9e needs {xz:.4f}; lower is better")
    say(f"report {run.report}\ntalk to it: {talk(run)}")


def pretrain(settings: Settings) -> tuple[Run, HeldOut | None, Sequence[Sample]]:
    """The whole stage: text, training, saved model, report."""
    if settings.mtp_depths and not settings.model.mtp:
        raise UserError(f"mtp_depths={settings.mtp_depths} but model.mtp is empty; set mtp_depths=0 or model.mtp=*E")
    keep_memory()
    work = Work(rows=settings.rows, length=settings.length, mtp_depths=settings.mtp_depths)
    ranks = start(settings.layout, settings.model, work)
    settings = ranks.on_first(lambda: settings)  # what they say of another run may change while processes start
    refuse_too_large(plan_of(settings, ranks.rows), memory_bytes())
    run = ranks.on_first(lambda: open_run(settings))
    found = sources_of(settings.data, settings.blend, undecodable=settings.undecodable, max_bytes=settings.max_bytes)
    prepared = ranks.first_then_all(
        lambda: prepare(found, run.folder / "data", vocab=settings.model.vocab, tokenizer=settings.tokenizer)
    )
    model = train(settings, run, prepared, ranks).eval()
    model.save(run.model, precision="fp32", tokenizer=prepared.tokenizer, facts=prepared.facts())
    opening = None if settings.reset else prepared.tokenizer.document_end
    return run, *examine(run, model, prepared.tokenizer, prepared.held_out(), prompts=settings.prompts, start=opening)


def train(settings: Settings, run: Run, prepared: Prepared, ranks: Ranks) -> Language:
    """The trained model, on the first process; the others end here."""
    model = ranks.distribute(Language(replace(settings.model, eos=prepared.tokenizer.stop), device="meta"))
    model.compute = ranks.on_first(lambda: compute_dtype(settings.compute))
    model.checkpointing, model.chunk = settings.checkpointing, settings.chunk
    model = lower(model, settings.precision, seed=settings.seed)
    optimizer = adamw(model, settings.optim)
    begin(run, settings, model, optimizer, ranks)
    fit(
        model,
        steps_of_rows(settings, prepared, ranks),
        objective(mtp_depths=settings.mtp_depths, mtp_weight=settings.mtp_weight, aux_weight=settings.aux_weight),
        optimizer,
        steps=settings.steps,
        schedule=schedule(settings.optim, settings.steps),
        clip=settings.optim.clip,
        balance=settings.balance,
        checkpoints=checkpoints(settings, run),
        guard=settings.guard,
        health_every=10,
        ranks=ranks,
    )
    model = ranks.gathered(model)
    if settings.average:
        model.load_state_dict(average_checkpoints(snapshots(run)[-settings.average :]))
    return model


def steps_of_rows(settings: Settings, prepared: Prepared, ranks: Ranks) -> Stream | Turns:
    """What this process reads of the text."""
    mine = {"seed": settings.seed, "reset": settings.reset, "rank": ranks.row, "ranks": ranks.rows}
    size = {"length": settings.length, "rows": settings.rows, "micro": settings.micro or settings.rows}
    blend = None if settings.blend is None else read_blend(settings.blend)
    return rows_of_lengths(
        partial(prepared.stream, **mine), settings.lengths, mixing=settings.mixing, **size, seed=settings.seed,
        blend=blend, steps=settings.steps,
    )  # fmt: skip
