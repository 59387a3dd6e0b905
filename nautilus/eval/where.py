"""Where the time of a step of decoding goes: its tape is played call by call, each call timed and told by its part."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nautilus.config import Config
from nautilus.eval.speed import Ready
from nautilus.model.language import Language
from nautilus.ops.cpu.library import check, native, recording
from nautilus.ops.cpu.tape import Tape

HEAD = "lm_head"  # whose product no module computes
OUTSIDE = "outside the kernels"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one part of the model takes of a step: native calls, seconds, also by kernel, and the bytes it must read."""

    part: str
    calls: int
    seconds: float
    kernels: dict[str, float]
    bytes: int


def where(ready: Ready) -> list[Spent]:
    """By part of the model, the longest first; the last entry is what lies between the calls. Empty where a step is not
    replayed. Times are medians over the steps of the work; to take them costs about a microsecond a call."""
    step = ready.step.recorded
    with calls_of(ready.engine.model) as modules:
        step.tape = None  # to be recorded anew
        ready.run(1)
    if step.tape is None:
        return []
    plain, timed, whole = step.tape, Timed(step.tape), []
    step.tape = timed
    for _ in range(ready.work.steps):
        begin = time.perf_counter()
        ready.run(1)
        whole.append(time.perf_counter() - begin)
    step.tape = plain
    modules += [HEAD] * (len(timed.names) - len(modules))
    between = statistics.median(one - sum(calls) for one, calls in zip(whole, timed.seconds, strict=True))
    outside = Spent(part=OUTSIDE, calls=0, seconds=between, kernels={}, bytes=0)
    return [*shared_out(ready, timed, modules), outside]


def shared_out(ready: Ready, timed: Timed, modules: list[str]) -> list[Spent]:
    config = ready.engine.model.config
    parts: dict[str, dict[str, list[int]]] = {}  # the calls of each part by kernel
    for index, module in enumerate(modules):
        parts.setdefault(part_of(module, config), {}).setdefault(kernel_of(timed.names[index]), []).append(index)
    reads = dict.fromkeys(parts, 0)
    for module, size in ready.reads.items():
        reads[part_of(caller(module, set(modules)), config)] += size
    seconds = lambda calls: statistics.median(sum(step[i] for i in calls) for step in timed.seconds)
    spent = [
        Spent(
            part=part,
            calls=sum(map(len, kernels.values())),
            seconds=seconds([*itertools.chain(*kernels.values())]),
            kernels={kernel: seconds(calls) for kernel, calls in kernels.items()},
            bytes=reads[part],
        )
        for part, kernels in parts.items()
    ]
    return sorted(spent, key=lambda part: -part.seconds)


class Timed(Tape):
    """The same calls on the same memory, one by one, and the seconds that each took in every step."""

    def __init__(self, tape: Tape):
        super().__init__()
        functions = native().functions
        assert functions is not None
        self.names, self.arguments, self.memory, self.result = tape.names, tape.arguments, tape.memory, tape.result
        self.functions = [functions[name] for name in tape.names]
        self.seconds: list[list[float]] = []

    def replay(self) -> Any:
        threads, seconds = torch.get_num_threads(), []
        for name, function, arguments in zip(self.names, self.functions, self.arguments, strict=True):
            record = ctypes.byref(arguments)
            begin = time.perf_counter()
            failure = function(record, threads)
            seconds.append(time.perf_counter() - begin)
            check(name, failure)
        self.seconds.append(seconds)
        return self.result


@contextlib.contextmanager
def calls_of(model: Language) -> Iterator[list[str]]:
    """The innermost module at each native call that is recorded inside; calls after the last module are left out."""
    modules: list[str] = []
    inside: list[str] = []

    def note() -> None:
        tape = recording.get()
        if isinstance(tape, Tape):
            modules.extend([inside[-1] if inside else HEAD] * (len(tape.names) - len(modules)))

    def enter(name: str, module: nn.Module, inputs: tuple) -> None:
        note()
        inside.append(name)

    def leave(module: nn.Module, inputs: tuple, result: Any) -> None:
        note()
        inside.pop()

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(functools.partial(enter, name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield modules


def caller(module: str, callers: set[str]) -> str:
    """The module itself or the one around it that makes native calls; experts' matrices are read by their mixer's."""
    while module and module not in callers:
        module = module.rpartition(".")[0]
    return module or HEAD


def part_of(module: str, config: Config) -> str:
    """`Mamba in_proj` for backbone.layers.3.mixer.in_proj: the same parts of all layers of a kind are one."""
    top, *rest = module.split(".")
    if top != "backbone" or rest[0] != "layers":
        return rest[-1] if rest else "head"
    kind, inner = type(config.layers[int(rest[1])]).__name__, rest[2:]
    if inner[:1] == ["mixer"]:
        part = ".".join(inner[1:]).replace("shared_experts", "shared").removesuffix("experts")
        return f"{kind} {part}".rstrip()
    return "norms" if inner else "residual"


def kernel_of(call: str) -> str:
    return call.removeprefix("nautilus_").removesuffix("_forward")
