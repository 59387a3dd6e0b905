"""Training state on disk.

    run/state/step_000001200/       the newest two states are kept
        model.safetensors           parameters (float32 masters) and buffers (load-balancing biases)
        training.safetensors        optimiser moments and random states, by parameter name
        state.json                  step, tokens, position in the data, the settings that shape the curve
        sha256.json                 of the others
    Where many processes train, `shards/` (torch.distributed.checkpoint) stands in place of the two tensor files. Either
    kind is read by any number of processes, in any layout.
    run/snapshots/step_000001000/   model.safetensors only, kept for averaging

A folder appears whole or not at all, and is read only if its checksums hold; otherwise the one before it is used.

While training goes on, a thread writes the state, from a copy in host memory: the training is held up only by that
copy. The next save, a stop, the way back after a spike and the end wait for the thread; what it failed of ends the
training at the next step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nautilus.config.keys import short
from nautilus.model.shards import write_file
from nautilus.runtime import Progress, Run, UserError, read_json, read_metrics, repair
from nautilus.train.beside import Beside
from nautilus.train.guard import Guard, Spike, Watch, endure, incidents, note
from nautilus.train.moments import moments, random_states, restore_moments, restore_random_states
from nautilus.train.ranks import ALONE, Ranks

log = logging.getLogger("nautilus.train")
RECORD = {"step": int, "tokens": int, "stream": dict, "settings": dict}
CURE = "restore the state from a copy, or remove it to go on from the one before"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often `fit` saves; it also saves at the end and when it is interrupted.

    every: updates between saves, 0: none in between. snapshots: updates between weights kept for averaging, 0: none.
    settings: whatever shapes the curve and `fit` cannot see, such as the stage's own settings. Resuming with others is
    an error that names them. first: save before the first step too, to have somewhere to go back to. hold: numbers of
    updates after which the state is saved and never removed. most_snapshots: older ones are removed, 0: none is.
    beside: training goes on while a state is written, which takes a copy of weights and moments in host memory.
    """

    run: Run
    every: int = 0
    snapshots: int = 0
    settings: dict = field(default_factory=dict)
    first: bool = False
    hold: tuple[int, ...] = ()
    most_snapshots: int = 0
    beside: bool = True

    def __post_init__(self):
        if self.every < 0 or self.snapshots < 0:
            raise ValueError(
                f"checkpoints.every={self.every} and checkpoints.snapshots={self.snapshots} are numbers of updates; "
                f"neither may be negative, 0 switches one off"
            )


@dataclass(frozen=True, kw_only=True)
class Position:
    """A moment between two updates, weights and moments aside."""

    step: int = 0
    tokens: int = 0
    stream: dict = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)


# ----- training state ------------------------------------------------------------------------------------------------


def save_state(
    run: Run,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict,
    ranks: Ranks = ALONE,
    hold: Sequence[int] = (),
    beside: Beside | None = None,
) -> None:
    """Writes the state and forgets all but this one, the one before, and those of the steps in `hold`.

    With `beside` it only copies the state as it is now, and begins to write the copy there.
    """
    training = moments(model, optimizer) | {f"random.{name}": value for name, value in position.random.items()}
    parts = [ranks.parts(model.state_dict()), ranks.parts(training)]
    record = {"step": position.step, "tokens": position.tokens, "stream": position.stream, "settings": settings}
    text, target = json.dumps(record, indent=1), run.state / step_name(position.step)
    if beside is None:
        return write_state(run, target, text, parts, ranks, hold)
    copies = [{name: tensor.detach().to("cpu", copy=True) for name, tensor in part.items()} for part in parts]
    beside.begin(partial(write_state, run, target, text, copies, ranks.apart(), hold))


def write_state(
    run: Run, target: Path, record: str, parts: Sequence[dict[str, Tensor]], ranks: Ranks, hold: Sequence[int]
) -> None:
    """parts: of the model, and of the training; see `Ranks.parts`."""
    with ranks.folder(target) as folder:
        ranks.write(folder, *parts)
        ranks.on_first(lambda: seal(folder, record))
    ranks.on_first(lambda: forget_states_before(run, target, hold))


def seal(folder: Path, record: str) -> None:
    (folder / "state.json").write_text(record)
    files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    (folder / "sha256.json").write_text(json.dumps({name: sha256(folder / name) for name in files}, indent=1))


def forget_states_before(run: Run, target: Path, hold: Sequence[int] = ()) -> None:
    """All but the one before, and those of the steps in `hold`."""
    earlier = [folder for folder in state_folders(run) if folder < target]
    held = {run.state / step_name(step) for step in hold}
    for folder in set(state_folders(run)) - {target, *earlier[-1:], *held}:
        shutil.rmtree(folder)


def load_state(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, ranks: Ranks = ALONE
) -> Position | None:
    """Puts the newest sound state into model and optimiser and gives its position; None where there is no state.

    UserError when `settings` differ from those it was saved under, or when no state is sound.
    """
    folder = ranks.on_first(lambda: newest_sound(run))
    if folder is None:
        return None
    record = read_record(folder)
    refuse_other_settings(run, record["settings"], settings)
    try:
        training = ranks.read(folder, model)
    except RuntimeError as bad:
        raise UserError(f"cannot resume {run.folder}: its state is of another model. {bad}; start a new run") from bad
    restore_moments(model, optimizer, training)
    random = {name.removeprefix("random."): value for name, value in training.items() if name.startswith("random.")}
    return Position(step=record["step"], tokens=record["tokens"], stream=record["stream"], random=random)


def read_record(folder: Path) -> dict:
    """What state.json holds; its checksum says that it is as it was written, not that this version wrote it."""
    record = read_json(folder / "state.json", CURE)
    wrong = [f"{name}={short(record.get(name))}" for name, kind in RECORD.items() if type(record.get(name)) is not kind]
    if not wrong and step_name(record["step"]) != folder.name:
        wrong = [f"step={record['step']}"]
    if wrong:
        raise UserError(f"{folder / 'state.json'} is no record of this state: it has {', '.join(wrong)}; {CURE}")
    return record


def step_name(step: int) -> str:
    return f"step_{step:09}"


def state_folders(run: Run) -> list[Path]:
    """Oldest first. What killed saves left behind is cleared away on the way."""
    if run.state.exists() and not run.state.is_dir():
        raise UserError(f"cannot resume {run.folder}: {run.state} is no folder; move it away, or choose another run")
    for leftover in run.state.glob(".step_*"):
        repair(run.state / f"step_{leftover.name.removeprefix('.step_').partition('.')[0]}")
    return sorted(run.state.glob("step_*"))


def newest_sound(run: Run) -> Path | None:
    """The newest state whose checksums hold. Newer, damaged ones are set aside, out loud."""
    damaged = []
    for folder in reversed(state_folders(run)):
        fault = damage(folder)
        if fault is None:
            return folder
        serial = len([*run.state.glob(f"damaged_*{folder.name}")])
        aside = folder.rename(folder.with_name(f"damaged_{serial}_{folder.name}"))
        damaged.append(f"{folder.name}: {fault}")
        log.warning("the saved state %s is damaged (%s); moved to %s, trying the one before", folder, fault, aside.name)
    if damaged := damaged or [folder.name for folder in run.state.glob("damaged_*")]:
        raise UserError(
            f"cannot resume {run.folder}: every saved state is damaged ({'; '.join(damaged)}); restore one from a "
            f"copy, or remove {run.state} to start again from the beginning"
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a state folder; None if every checksum holds."""
    try:
        sums = json.loads((folder / "sha256.json").read_text())
        wrong = [name for name, want in sums.items() if sha256(folder / name) != want]
    except (OSError, ValueError, AttributeError) as bad:
        return str(bad)
    tensors = {"shards/.metadata"} if (folder / "shards").is_dir() else {"model.safetensors", "training.safetensors"}
    missing = {*tensors, "state.json"} - set(sums)
    return f"wrong checksum of {', '.join(sorted({*wrong, *missing}))}" if wrong or missing else None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_settings(run: Run, saved: dict, now: dict) -> None:
    old, new = dict(flat(saved)), dict(flat(json.loads(json.dumps(now))))
    changed = [
        f"{name} was {old.get(name, 'absent')} and is now {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]
    if changed:
        more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise UserError(
            f"cannot resume {run.folder} with settings that change its curve: {'; '.join(changed[:8])}{more}. "
            f"Give the old settings, or start a new run in another folder"
        )


def flat(value, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, plain value) for everything inside nested dicts and lists."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


# ----- snapshots ----------------------------------------------------------------------------------------------------


def save_snapshot(run: Run, step: int, model: nn.Module, ranks: Ranks = ALONE) -> Path:
    """The weights after `step` updates, kept for averaging."""
    target = run.folder / "snapshots" / step_name(step)
    weights = ranks.weights(model)
    with ranks.folder(target) as folder:
        ranks.on_first(lambda: write_file(folder / "model.safetensors", weights))
    return target


def snapshots(run: Run) -> list[Path]:
    """The snapshot folders of a run, oldest first."""
    return sorted((run.folder / "snapshots").glob("step_*"))


def forget_snapshots(checkpoints: Checkpoints) -> None:
    """All but the newest `most_snapshots`."""
    if checkpoints.most_snapshots:
        for folder in snapshots(checkpoints.run)[: -checkpoints.most_snapshots]:
            shutil.rmtree(folder)


# ----- what the loop calls -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Saver:
    """The loop's dealings with the disk; without `checkpoints` there are none.

    `settings` is what shapes the curve: a run is resumed only under the same.
    """

    checkpoints: Checkpoints | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Any
    settings: dict
    ranks: Ranks = ALONE
    writing: Beside = field(default_factory=Beside)

    def resume(self) -> Position:
        """Continues from the newest sound state: weights, moments, data and random states; else from the start."""
        if self.checkpoints is None:
            return Position()
        found = load_state(self.checkpoints.run, self.model, self.optimizer, self.settings, self.ranks)
        if found is None:
            begun = self.position(0, 0)
            if self.checkpoints.first:
                self.save(begun)
            return begun
        self.stream.restore(found.stream)
        restore_random_states(found.random)
        return found

    def recall(self, watch: Watch, step: int) -> None:
        """What the run's metrics say of the steps before `step`."""
        if (own := self.checkpoints) is None:
            return watch.refill((), step)
        watch.refill(self.ranks.on_first(lambda: read_metrics(own.run.metrics)), step)

    def roll_back(self, spike: Spike, guard: Guard) -> None:
        """Notes the spike and saves the newest sound state anew with the stream behind the offending step, so that
        whatever happens next goes on from there. Raises it where it may not be answered so, on all processes alike."""
        if self.checkpoints is None:
            raise spike
        self.writing.wait()
        run, behind = self.checkpoints.run, self.stream.state()
        endure(guard, run.incidents, self.ranks.on_first(lambda: incidents(run.incidents)), spike)
        found = load_state(run, self.model, self.optimizer, self.settings, self.ranks)
        if found is None:
            raise UserError(f"{spike}. There is no saved state to go back to") from spike
        self.ranks.on_first(lambda: note(run.incidents, spike, found.step, (found.stream, behind)))
        where = run.incidents
        if self.ranks.index == 0:
            log.warning("a spike at step %d (see %s). Going back to step %d; the text since then is skipped",
                        spike.step, where, found.step)  # fmt: skip
        self.save(replace(found, stream=behind))

    def position(self, step: int, tokens: int) -> Position:
        if self.checkpoints is None:
            return Position(step=step, tokens=tokens)
        return Position(step=step, tokens=tokens, stream=self.stream.state(), random=random_states())

    def after_step(self, position: Position, *, last: bool) -> None:
        """Saves what is due after a step; the last one always is, and then nothing is still being written."""
        if self.checkpoints is None:
            return
        own, step = self.checkpoints, position.step
        if own.snapshots and step % own.snapshots == 0:
            save_snapshot(own.run, step, self.model, self.ranks)
            self.ranks.on_first(lambda: forget_snapshots(own))
        if last or (own.every and step % own.every == 0) or step in own.hold:
            self.save(position, beside=own.beside and not last)

    def save(self, position: Position, *, beside: bool = False) -> None:
        """beside: only begins to, and the training may go on."""
        if self.checkpoints is None:
            return
        self.writing.wait()  # before there is another copy
        run, hold, where = self.checkpoints.run, self.checkpoints.hold, self.writing if beside else None
        save_state(run, position, self.model, self.optimizer, self.settings, self.ranks, hold, where)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """An error inside is raised when nothing is being written any more; going back after a spike waits itself."""
        try:
            yield
        except Spike:
            raise
        except Exception:
            with self.writing.aside():
                self.writing.wait()
            raise

    @contextlib.contextmanager
    def progress(self, start: int, steps: int) -> Iterator[Callable[[dict], None]]:
        """The run's progress line and metrics file."""
        if self.checkpoints is None or self.ranks.index:
            yield lambda metrics: None
            return
        with Progress(self.checkpoints.run.metrics, steps, start) as show:
            if start:
                show.say(f"resuming {self.checkpoints.run.folder} after step {start} of {steps}")
            yield show
