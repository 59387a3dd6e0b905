"""The one training loop. A stage brings a stream of micro-batches and an objective; everything else is here.

    for each step:
        counts    = sum of the weights of every term, over the step's micro-batches and ranks
        gradient += d/dw sum over terms of coefficient * sum / count         for each micro-batch
        clip, update the weights, then the load-balancing biases
        the same with the next micro-batches, where the step has several updates
        write one line of metrics; save when it is time, or when somebody asked to stop

Because counts are known before the first forward, the update does not depend on how the step is cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from operator import attrgetter

import torch
from torch import Tensor

from nautilus.config import PrecisionTable, to_dict
from nautilus.data.batch import Batch
from nautilus.model.held import refuse_training
from nautilus.model.language import Language
from nautilus.model.precision import Lowered, rows_taken
from nautilus.runtime import UserError
from nautilus.train.balance import take_loads, update_biases
from nautilus.train.checkpoint import Checkpoints, Saver
from nautilus.train.guard import Guard, Spike, Watch, divergence, each_once
from nautilus.train.health import gradient_health, load_health, residual_rms, speed
from nautilus.train.interrupt import Stop, leave, stop_signals
from nautilus.train.objective import Objective, Pairs, Terms
from nautilus.train.optim import clip_gradients, gradient_norm
from nautilus.train.ranks import ALONE, Ranks
from nautilus.train.sums import Sums, means, over_updates


def silent(metrics: dict) -> None:
    pass


def fit(
    model: Language,
    stream: Iterable[list[Batch]],
    objective: Objective | Terms,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    clip: float = 1.0,
    balance: float = 1e-3,
    checkpoints: Checkpoints | None = None,
    guard: Guard | None = None,
    health_every: int = 0,
    peak_flops: float = 0.0,
    ranks: Ranks = ALONE,
    log: Callable[[dict], None] = silent,
) -> dict:
    """Trains until `steps` are made, and returns the last one's metrics (none if none was left to make).

    stream: gives the list of micro-batches of one step at a time, which are learnt by one update, or by one for each
    `update` that they name; with `checkpoints` it must also have state() and restore(dict). schedule: step number →
    learning rate. balance: move of the load-balancing biases, 0: none.
    checkpoints: save there, continue from what is there, and stop cleanly (SystemExit) on SIGINT and SIGTERM.
    guard: what counts as a spike, and how often the run may go back because of one (needs checkpoints).
    ranks: the processes that train together, which have shared the model out. log: is handed each step's metrics.
    """
    refuse_training(model)
    job = Job(
        model=model,
        objective=objective if isinstance(objective, Objective) else Objective(objective),
        optimizer=optimizer,
        schedule=schedule,
        clip=clip,
        balance=balance,
        health_every=health_every,
        peak_flops=peak_flops,
        ranks=ranks,
        watch=Watch(guard or Guard()),
    )
    settings = {"fit": job.settings()} | (checkpoints.settings if checkpoints else {})
    saver = Saver(
        checkpoints=checkpoints, model=model, optimizer=optimizer, stream=stream, settings=settings, ranks=ranks
    )
    while True:
        try:
            return train_on(job, saver, steps, log)
        except Spike as spike:
            forget_gradients(job)
            saver.roll_back(spike, job.watch.guard)


def train_on(job: Job, saver: Saver, steps: int, log: Callable[[dict], None]) -> dict:
    """From the newest state, or from the start, to the last step."""
    position, metrics, checkpoints, ranks, asked = saver.resume(), {}, saver.checkpoints, job.ranks, False
    saver.recall(job.watch, position.step)
    batches = iter(saver.stream)
    job.model.train()
    with saver.progress(position.step, steps) as show, saver.settled(), stop_signals(checkpoints is not None) as stop:
        for step in range(position.step, steps):
            try:
                done = train_step(job, step, position.tokens, batches, stop if ranks.size == 1 else Stop())
            except UserError as bad:  # of a stream that cannot go on: what was learnt is kept
                if position.step and ranks.size == 1 and not isinstance(bad, Spike):
                    with saver.writing.aside():
                        saver.save(position)
                raise
            if done is None:
                saver.save(position)
                asked = True
                break
            metrics = done
            for told in (job.watch.add, show, log):
                told(metrics)
            position = saver.position(step + 1, metrics["tokens"])
            asked = ranks.agree(bool(stop.asked) or saver.writing.failed)  # after a failure the last save raises it
            saver.after_step(position, last=asked or step + 1 == steps)
            if asked:
                break
        if asked:
            leave(stop, position.step, checkpoints.run.folder if checkpoints else "memory only")
    return metrics


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same from step to step."""

    model: Language
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float] | None
    clip: float
    balance: float
    health_every: int
    peak_flops: float
    ranks: Ranks
    watch: Watch = field(default_factory=Watch)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def settings(self) -> dict:
        """What shapes the curve: a run may be resumed only under the same."""
        speed_only = {"params", "foreach", "fused", "capturable", "differentiable"}
        ours = speed_only if self.schedule is None else speed_only | {"lr", "initial_lr"}
        groups = [{k: v for k, v in group.items() if k not in ours} for group in self.optimizer.param_groups]
        lowered = self.model.lowered
        few = {} if lowered is None else {"precision": to_dict(lowered.table) | {"seed": lowered.seed}}
        return few | {
            "model": to_dict(self.model.config) | {"compute": str(self.model.compute)},
            "optimizer": {"kind": type(self.optimizer).__name__, "groups": groups},
            "objective": dict(self.objective.coefficients),
            "clip": self.clip,
            "balance": self.balance,
        }


# ----- one step ------------------------------------------------------------------------------------------------------


def train_step(job: Job, step: int, tokens: int, stream: Iterator[list[Batch]], stop: Stop) -> dict | None:
    """The updates of a step, mostly one, and the means of their metrics. None, with the model as it was, if a stop was
    asked for between micro-batches; once one update is made, the others are too."""
    begin, before, found = time.perf_counter(), tokens, list[dict[str, float]]()
    for _, part in groupby(next_step(stream, step), attrgetter("update")):
        done = make_update(job, step, tokens, [*part], Stop() if found else stop, first=not found)
        if done is None:
            return None
        tokens += int(done.pop("fed"))
        found.append(done)
    rate = speed(job.model, (tokens - before) / (time.perf_counter() - begin), job.peak_flops)
    return {"step": step, "tokens": tokens, **over_updates(found), **rate}


def make_update(
    job: Job, step: int, tokens: int, given: list[Batch], stop: Stop, *, first: bool
) -> dict[str, float] | None:  # fmt: skip
    """One update: its metrics, and how many tokens it was `fed`. None, before it is made, if a stop is asked for."""
    checked = first and job.health_every > 0 and step % job.health_every == 0
    rows = [rows_of(job, batch) for batch in given]
    if job.model.lowered is not None:
        job.model.lowered.begin(step, tokens, row=job.ranks.before(sum(rows)), watched=checked)
    batches = [job.ranks.part(job.objective.weigh(batch)) for batch in given]
    counts = count_weights(batches, job.ranks)
    sums = add_gradients(job, batches, rows, counts, stop)
    if sums is None:
        forget_gradients(job)
        return None
    norm = gradient_norm(job.parameters, job.ranks)
    loss = job.ranks.total(torch.stack(sums.losses).sum()).item()
    refuse_spikes(job, step, batches, sums, {"loss": loss, "grad_norm": norm.item()})
    loads = take_loads(job.model, job.ranks.total)
    health = check_up(job, batches[0], loads) if checked else {}
    update(job, step, norm, loads)
    fed = int(job.ranks.total(torch.tensor(sum(batch.tokens.numel() for batch in given)))) // job.ranks.readers
    known = {"loss": loss, "lr": job.optimizer.param_groups[0]["lr"], "grad_norm": norm.item(), "fed": fed}
    return known | means(sums, counts, job.ranks) | health


def rows_of(job: Job, batch: Batch) -> int:
    """How many rows of addresses a micro-batch takes for its products in few bits, over all that share its rows."""
    batch_rows, time = batch.tokens.shape
    piece = time // job.ranks.readers if job.ranks.readers > 1 else job.model.chunk or time
    return rows_taken(batch_rows, time, piece)


def next_step(stream: Iterator[list[Batch]], step: int) -> list[Batch]:
    micro_batches = next(stream, None)
    if not micro_batches:
        what = "ended before" if micro_batches is None else "gave no micro-batch for"
        raise UserError(f"the stream {what} step {step}; ask for fewer steps or give it more data")
    return micro_batches


def update(job: Job, step: int, norm: Tensor, loads: dict[str, Tensor]) -> None:
    """Moves the weights along the clipped gradient, then the load-balancing biases."""
    if job.schedule is not None:
        for group in job.optimizer.param_groups:
            group["lr"] = job.schedule(step)
    clip_gradients(job.parameters, job.clip, norm, job.ranks)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    update_biases(job.model, loads, job.balance)


def forget_gradients(job: Job) -> None:
    job.ranks.forget(job.model)
    job.optimizer.zero_grad(set_to_none=True)
    take_loads(job.model, ALONE.total)


def count_weights(batches: list[Batch], ranks: Ranks) -> dict[str, float]:
    """The count of every term: the sum of its weights over the whole step."""
    names = sorted({name for batch in batches for name in batch.weights})
    weights = {name: [batch.weights[name] for batch in batches if name in batch.weights] for name in names}
    totals = torch.stack([torch.stack([w.double().sum() for w in weights[name]]).sum() for name in names])
    counts = dict(zip(names, ranks.total(totals).tolist(), strict=True))
    if not any(counts.values()):
        raise UserError(
            f"a step of {len(batches)} micro-batches has no token to learn from: the weights of {', '.join(names)} "
            f"are all 0; check how the data marks its targets"
        )
    return counts


def add_gradients(job: Job, batches: list[Batch], rows: list[int], counts: dict[str, float], stop: Stop) -> Sums | None:
    """Adds the gradient of the step's loss to the parameters, in their own dtype (float32 masters: float32 sums)."""
    lowered = job.model.lowered or Lowered(PrecisionTable())
    sums, coming, under_way = Sums(), zip(batches, accumulate(rows, initial=lowered.row), strict=False), deque()
    for turn in job.ranks.turns(len(batches)):
        if stop.asked:
            return None
        if turn == "forward":
            batch, lowered.row = next(coming)
            loss, pairs = weighted_loss(job, batch, counts)
            sums.add(loss, pairs)
            under_way.append((loss, lowered.row))
        else:
            loss, lowered.row = under_way.popleft()
            job.ranks.backward(loss)
    job.ranks.join_copies(job.model)
    return sums.over_stages(job.ranks)


def weighted_loss(job: Job, batch: Batch, counts: dict[str, float]) -> tuple[Tensor, Pairs]:
    """A micro-batch's part of the step's loss, and everything that the objective gives."""
    device = job.parameters[0].device
    terms, watched = job.objective.terms(job.model, batch.to(device))
    if unknown := sorted(terms.keys() - counts.keys()):
        raise ValueError(
            f"the objective has terms {', '.join(unknown)} but the batches carry weights for {', '.join(counts)}; "
            f"a term's count is the sum of the weights of its name"
        )
    loss = torch.zeros((), device=device)
    for name, (total, _) in terms.items():
        if counts[name]:
            loss = loss + total * (job.objective.coefficients.get(name, 1.0) / counts[name])
    return loss, terms | watched | {name: (torch.tensor(a), torch.tensor(b)) for name, (a, b) in batch.told.items()}


def check_up(job: Job, batch: Batch, loads: dict[str, Tensor]) -> dict[str, float]:
    everywhere = job.ranks.union({name: load_E.cpu() for name, load_E in loads.items()})
    found = gradient_health(job.model, job.model.config, job.ranks) | load_health(everywhere)
    found |= {} if job.model.lowered is None else job.model.lowered.flush_rates(job.ranks.gather)
    return found | residual_rms(job.model, batch.to(job.parameters[0].device), job.ranks)


def refuse_spikes(job: Job, step: int, batches: list[Batch], sums: Sums, found: dict[str, float]) -> None:
    """Raises a Spike where the update must not be made. The weights have not been touched yet."""
    diverged = not all(map(math.isfinite, found.values()))
    if not diverged and not job.watch.fault(found):
        return
    # What was found is the same on all processes, so all of them come here.
    marks = each_once(job.ranks.gather([batch.fingerprint for batch in batches]))
    if diverged:
        raise Spike(divergence(job.model, job.ranks, step, batches, sums, marks), step, marks, found)
    job.watch.refuse(step, found, marks)
