"""A training that follows another: a new phase on its weights, or its decay begun at once; and published settings.

    from=RUN              its settings and newest state; a phase of its own at the rate it ended with
    from=RUN anneal=N     the same training goes on, its rate falling from here to min_lr over N updates
    from=RUN/state/step_… the same from an earlier state
    from=FOLDER           a checkpoint folder: its weights and tokenizer, all else anew; the layout may be any
    from=OWNER/NAME       the same of the hub; where it was put is remembered
    out=RUN steps=MORE    the run itself goes on, from its newest state up to which both have the same rates

Where the new run began stands in its origin.json, so that its own resuming does not ask the old run again.
"""

from __future__ import annotations

import json
import shutil
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from nautilus.config import Based, Config, from_dict, setting, to_dict
from nautilus.config.override import asked_int, record_type
from nautilus.data.turns import check_lengths
from nautilus.model.initialise import initial_values
from nautilus.model.language import Language
from nautilus.model.weights import check_trainable, local_folder, stored_weights
from nautilus.presets import preset
from nautilus.runtime import (
    HUB_ID,
    Run,
    UserError,
    atomic_folder,
    continue_or_create,
    is_run,
    read_json,
    write_atomic,
)
from nautilus.train.checkpoint import Checkpoints, newest_sound, read_record, state_folders
from nautilus.train.guard import Guard
from nautilus.train.moments import restore_moments
from nautilus.train.optim import OptimConfig, learning_rate, schedule
from nautilus.train.published import LATER, published
from nautilus.train.ranks import ALONE, Ranks

OWN = ("out", "from_", "anneal", "recipe", "lengths", "mixing", "average")  # what a following run does not inherit


@dataclass(frozen=True, kw_only=True)
class Following(Based):
    """Settings of a training that may follow another, or a published one. Whoever inherits adds `model`."""

    out: Path = setting(Path("runs/pretrain"), "the run's folder; resumed if it is there")
    steps: int = setting(1000, "updates")
    length: int = setting(512, "tokens of a row")
    optim: OptimConfig = OptimConfig(lr=3e-3, min_lr=3e-5, warmup=-1)
    tokenizer: Path | None = setting(None, "folder of a tokenizer to use; none: learn one")
    save_every: int = setting(200, "updates between saved states, 0: only at the end")
    save_async: bool = setting(True, "write states while training goes on, from a copy in memory of 12 bytes a weight")
    average: int = setting(0, "of how many snapshots of the last stretch the final weights are made, 0: none")
    average_every: int = setting(50, "updates between those snapshots")
    recipe: str = setting("", "published numbers for what is not given: nano, super, ultra; super_long with from=")
    from_: Path | None = setting(None, "run, saved state, checkpoint folder or hub id to start from; its settings hold")
    anneal: int = setting(0, "with from: go on there, the rate falling at once over so many updates; 0: a new phase")
    lengths: tuple[str, ...] = setting((), "rows of several lengths, share*tokens each: 0.9*65536,0.1*256")
    mixing: str = setting("turns", "of lengths: turns, one length an update, or together, all in each")
    guard: Guard = Guard()

    def __post_init__(self):
        if self.anneal < 0 or (self.anneal and self.from_ is None):
            raise UserError(f"anneal={self.anneal} updates begin at a saved state; give from=RUN, and at least 1")
        check_lengths(self.lengths, self.mixing)
        if self.average * self.average_every > self.steps:
            raise UserError(
                f"average={self.average} snapshots, one every average_every={self.average_every} updates, do not fit "
                f"into steps={self.steps}; lower one of them or raise steps"
            )
        schedule(self.optim, self.steps)

    @classmethod
    def base(cls, asked: Mapping[str, str]) -> Self:
        """What the run to follow was made with, and the published numbers; what was asked for comes on top."""
        start = cls()
        out = Path(asked["out"]) if "out" in asked else start.out
        origin = find_origin(Path(asked["from"]), out) if asked.get("from") else None
        if origin is not None:
            start = following(start, origin, asked_int(asked, "anneal", 0))
        start = follow_recipe(start, asked, origin) if asked.get("recipe") else start
        return start if "mtp_depths" in asked or has_block(start, asked) else replace(start, mtp_depths=0)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run began: a state folder of another (`step` updates into it), or weights alone (step -1)."""

    folder: str
    step: int


def find_origin(source: Path, out: Path) -> Origin:
    """What `out` says of its origin; for a new run the newest sound state of `source`, or what it is itself."""
    if (told := out / "origin.json").is_file():
        found, cure = read_json(told), "restore it from a copy, or start a new run"
        if type(found.get("step")) is not int or not isinstance(found.get("folder"), str):
            raise UserError(f"{told} has {sorted(found)}, not the folder and the step where {out} began; {cure}")
        return Origin(folder=found["folder"], step=found["step"])
    if is_run(source):
        found = newest_sound(Run.open(source))
        if found is None:
            raise UserError(f"from={source} is a run without a saved state; wait for one, or give from={source}/model")
        return Origin(folder=str(found), step=read_record(found)["step"])
    if (source / "state.json").is_file():
        return Origin(folder=str(source), step=read_record(source)["step"])
    if not source.exists() and HUB_ID.fullmatch(str(source)):
        source = local_folder(source)
    if not (source / "config.json").is_file():
        raise UserError(f"from={source} is no run, no saved state, no checkpoint folder and no hub id (owner/name)")
    return Origin(folder=str(source), step=-1)


def run_of(origin: Origin) -> Run:
    return Run(Path(origin.folder).parent.parent)


def following(start, origin: Origin, anneal: int):
    """The settings of the run that is followed, at the rate it has there."""
    if origin.step < 0:
        if anneal:
            raise UserError(f"anneal={anneal} goes on with a training, but from={origin.folder} holds weights only")
        folder = Path(origin.folder)
        tokenizer, model = folder if (folder / "tokenizer.json").is_file() else None, check_trainable(folder).config
        return replace(start, model=model, tokenizer=tokenizer)
    run = run_of(origin)
    told = settings_of(type(start), run, without=OWN)
    told = replace(told, tokenizer=told.tokenizer or tokenizer_of(run))
    return replace(told, **following_curve(told.optim, told.steps, origin.step, anneal))


def following_curve(optim: OptimConfig, steps: int, step: int, anneal: int) -> dict[str, Any]:
    """Settings that fall from the rate of update `step` over `anneal` updates, or (0) stay at it."""
    rate = learning_rate(step, steps, optim)
    if not anneal:
        return {"optim": replace(optim, lr=rate, min_lr=rate, warmup=0, decay=0.0)}
    whole = step + anneal
    low = min(optim.min_lr, rate)
    return {"steps": whole, "optim": replace(optim, lr=rate, min_lr=low, warmup=0, decay=anneal / whole)}


def tokenizer_of(run: Run) -> Path:
    """The folder of the tokenizer that a run uses."""
    for folder in (run.model, *sorted((run.folder / "data").glob("tokenizer-*"))):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(f"the run in {run.folder} has no tokenizer left; give tokenizer=")


def follow_recipe(start, asked: Mapping[str, str], origin: Origin | None):
    """The published numbers at this run's size."""
    name, steps = asked["recipe"], asked_int(asked, "steps", start.steps)
    if name not in LATER:
        return replace(start, recipe=name, **published(name).settings(steps, depth(start, asked)))
    if origin is None:
        raise UserError(f"recipe={name} goes on with a trained model; give from=RUN")
    model, stage = LATER[name]
    length = asked_int(asked, "length", start.length)
    later = published(model).long_settings(stage, steps=start.steps, length=length, rate=start.optim.lr)
    return replace(start, **later)


def depth(start, asked: Mapping[str, str]) -> int:
    """How many layers the model that is asked for has."""
    return len(asked.get("model.layers") or model_of(start, asked).layers)


def has_block(start, asked: Mapping[str, str]) -> bool:
    """Whether the model that is asked for has a block that predicts more tokens than the next."""
    return bool(asked.get("model.mtp", model_of(start, asked).mtp))


def model_of(start, asked: Mapping[str, str]) -> Config:
    """The model that is asked for, before its sizes are changed."""
    return preset(asked["model"]) if "model" in asked else start.model


def settings_of(kind, run: Run, without: Sequence[str] = ()):
    """What the run was begun with, as a record of this kind. UserError where its config.json is damaged."""
    try:
        return restored(kind, {name: value for name, value in run.settings.items() if name not in without})
    except (ValueError, TypeError, AttributeError, LookupError) as bad:
        raise UserError(
            f"{run.config} has settings that cannot be ({bad}); restore it from a copy, or start a new run"
        ) from bad


def restored(kind, values: Mapping[str, Any]):
    """A settings record from what config.json keeps of it; settings that it lacks have their defaults."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name in values]
    return kind(**{name: restored_value(hints[name], values[name]) for name in names})


def restored_value(hint, value):
    kind = record_type(hint)
    if value is None or isinstance(hint, types.UnionType) and kind is hint:
        return value
    if kind is Config:
        return from_dict(value)
    if is_dataclass(kind):
        return restored(kind, value)
    if typing.get_origin(kind) is tuple:
        return tuple(restored_value(typing.get_args(kind)[0], item) for item in value)
    return kind(value)


# ----- on disk -------------------------------------------------------------------------------------------------------


def kept(settings) -> dict[str, Any]:
    """What a run remembers: not how its processes share it out and save it, which changes no curve."""
    return {name: value for name, value in to_dict(settings).items() if name not in ("layout", "save_async")}


def open_run(settings) -> Run:
    """The run in settings.out, new or to be resumed; one that follows another knows from here on where it began."""
    out, source = settings.out, settings.from_
    extend(out, settings)
    if source is None:
        run = continue_or_create(out, kept(settings), free=(apart := getattr(settings, "apart", ())))
        if apart:
            run.write_settings(kept(settings))
        return run
    if source.resolve() == out.resolve():
        raise UserError(
            f"from={source} and out={out} are one folder; choose another out=, or raise steps= without from"
        )
    origin = find_origin(source, out)
    if settings.anneal and settings.steps != origin.step + settings.anneal:
        raise UserError(
            f"anneal={settings.anneal} from step {origin.step} ends after {origin.step + settings.anneal} updates, not "
            f"steps={settings.steps}; leave steps out"
        )
    run = continue_or_create(out, kept(settings))
    write_atomic(run.folder / "origin.json", json.dumps({"folder": origin.folder, "step": origin.step}) + "\n")
    return run


def begin(run: Run, settings, model: Language, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> None:
    """Puts weights (and moments) in place for a run without a state of its own; `fit` resumes one that has.

    A decay begun at once gets the whole state, and so goes on in every respect as the other run would have.
    """
    if ranks.on_first(lambda: bool(state_folders(run) or [*run.state.glob("damaged_*")])):  # which `fit` is to say
        return
    if settings.from_ is None:
        ranks.fill(model, initial_values(model.config, settings.seed))
        return
    origin = find_origin(settings.from_, run.folder)
    source = Path(origin.folder)
    if not source.is_dir():
        raise UserError(f"{source}, which {run.folder} begins with, is gone; restore it, or start a new run")
    if settings.anneal:
        return ranks.on_first(lambda: copy_state(source, run.state / source.name))
    if origin.step < 0:
        return ranks.fill(model, stored_weights(source, settings.model))
    try:
        restore_moments(model, optimizer, ranks.read(source, model))
    except RuntimeError as bad:
        raise UserError(f"from={source} holds another model. {bad}; leave model settings as they are there") from bad


def copy_state(source: Path, target: Path) -> None:
    with atomic_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def extend(out: Path, settings) -> None:
    """Prepares a run to go on under another schedule: from its newest state up to which the rates are the same.

    States beyond are removed. A UserError if there is none; nothing is done where something else changed, too.
    """
    if not is_run(out) or not state_folders(run := Run.open(out).claim()):
        return
    begun = settings_of(type(settings), run)
    changed = replace(begun, steps=settings.steps, optim=settings.optim, out=settings.out)
    if begun == replace(settings, out=begun.out) or changed != settings or curveless(begun) != curveless(settings):
        return
    old, new = schedule(begun.optim, begun.steps), schedule(settings.optim, settings.steps)
    common = next((i for i in range(run.saved_step) if old(i) != new(i)), run.saved_step)
    usable = [f for f in state_folders(run) if read_record(f)["step"] <= min(common, settings.steps)]
    if not usable:
        raise UserError(
            f"cannot go on with the run in {out} up to steps={settings.steps}: its learning rates would have been "
            f"others from update {common} on, and no state up to there is kept; go on with out=NEW from={out}"
        )
    for folder in set(state_folders(run)) - set(usable):
        shutil.rmtree(folder)
    run.write_settings(kept(settings))


def curveless(settings) -> OptimConfig:
    """The optimiser's settings, but for those that only the schedule reads."""
    return replace(settings.optim, lr=1.0, min_lr=0.0, warmup=0, decay=0.0, shape="minus_sqrt")


def checkpoints(settings: Following, run: Run) -> Checkpoints:
    """What is saved on the way: where to go back to, what is averaged, and the state before the rate begins to fall,
    from which a longer run can go on."""
    start = int(settings.steps - settings.optim.decay * settings.steps + 1e-9)
    return Checkpoints(
        run=run,
        every=settings.save_every,
        beside=settings.save_async,
        first=settings.guard.rollbacks > 0,
        hold=(start,) if 0 < start < settings.steps else (),
        snapshots=settings.average_every if settings.average else 0,
        most_snapshots=settings.average,
    )
