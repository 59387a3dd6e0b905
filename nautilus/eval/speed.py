"""How fast a model decodes and reads prompts on this machine, and which share of what memory allows that is.

Decoding is bound by memory. A step must read every weight once, of experts those that one of its rows chose, read and
write the recurrent states, and read the keys and values of all tokens before it. The roofline is the time which that
takes at the bandwidth that is measured in the same turn.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from nautilus.config import Attention, Config, Mamba
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.lanes import MambaSlots, RestingSlots, bytes_per_token, new_memory
from nautilus.model.language import Embedding, Language
from nautilus.model.linear import Matrix
from nautilus.model.moe import ExpertsMixer, ExpertWeights
from nautilus.ops.cpu.library import native
from nautilus.ops.cpu.memory import read_speed, roomy
from nautilus.ops.formats import Packed
from nautilus.ops.pages import PAGE, Pool
from nautilus.ops.state_format import StateFormat
from nautilus.presets import shrink
from nautilus.runtime import UserError
from nautilus.serve import Engine
from nautilus.serve.forward import Part, Step
from nautilus.serve.memory import Berth

WIDE = {"bf16": torch.bfloat16, "f32": torch.float32}  # formats of keys and values that are numbers as they lie there
SETTLE = 3  # steps before the clock starts, of each kind: computed, recorded, replayed
COUNTED = 16  # steps whose distinct experts are counted: with few sequences they differ by a tenth from step to step
READ, PASSES = 1 << 29, 7  # bytes that are read to measure the bandwidth, and how often


@dataclass(frozen=True, kw_only=True)
class Work:
    """So many steps after a prompt, for so many sequences together; with steps=0 the reading of the prompt itself."""

    prompt: int
    sequences: int = 1
    steps: int = 0

    @property
    def name(self) -> str:
        if not self.steps:
            return f"prefill {self.prompt:,}"
        return f"{'decode' if self.sequences == 1 else f'{self.sequences} sequences'} after {self.prompt:,}"

    @property
    def positions(self) -> int:
        """Room that each sequence needs."""
        return self.prompt + max(self.steps, SETTLE)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One timing. bandwidth in bytes per second and share of the roofline: None for prompts and without native code."""

    tokens_per_s: float
    bandwidth: float | None = None
    share: float | None = None


class Meter:
    """An engine on which work is timed, with random tokens. UserError for work that the model has no room for."""

    def __init__(self, model: Language, works: Sequence[Work], *, cache: str = "", state: str = "fp32", seed: int = 0):
        require_room(model.config, works, cache, state)
        rows, longest = max(work.sequences for work in works), max(work.positions for work in works)
        no_text = cast(Tokenizer, None)  # neither goes in nor comes out
        self.engine = Engine(model, no_text, max_tokens=longest, rows=rows, cache=cache, state=state)
        self.draw = torch.Generator().manual_seed(seed)
        self.memory = roomy(READ).fill_(1) if native().functions is not None else None

    def tokens(self, count: int) -> list[int]:
        return torch.randint(self.engine.model.config.vocab, (count,), generator=self.draw).tolist()

    def bandwidth(self) -> float | None:
        """Bytes a second that torch's number of threads read, at best; None without native code."""
        return None if self.memory is None else max(read_speed(self.memory) for _ in range(PASSES))

    @contextlib.contextmanager
    def ready(self, work: Work, *, filled: bool = False) -> Iterator[Ready]:
        """The work right before the clock starts: memory taken, prompts read, steps recorded. filled: states, keys and
        values before a step are random numbers instead, in no time, whatever the length of a prompt."""
        berths: list[Berth] = []
        try:
            for _ in range(work.sequences):
                berth = self.engine.berths.take(work.positions)
                if berth is None:
                    raise UserError(
                        f"{work.name} was asked for; keys and values of {len(berths)} such sequences fill the share of"
                        f" memory that they may take; give sequences={len(berths)} or a shorter prompt"
                    )
                berths.append(berth)
            yield Ready(self, work, berths, filled)
        finally:
            for berth in berths:
                self.engine.berths.give_back(berth)


class Ready:
    """Work that can be timed again and again, always from the end of the same prompt."""

    def __init__(self, meter: Meter, work: Work, berths: list[Berth], filled: bool = False):
        self.meter, self.engine, self.work = meter, meter.engine, work
        self.berths, self.drawn = berths, []
        self.prompt = meter.tokens(work.prompt)
        self.reads: dict[str, int] = {}  # bytes by module of the model
        if work.steps:
            for berth in berths:
                self.fill(berth) if filled else self.read(meter.tokens(work.prompt), berth)
            chosen = self.chosen()
            self.reads = weights_read(self.engine.model, len(berths), chosen)
            for name, size in states_read(self.engine, len(berths), work.prompt + work.steps // 2).items():
                self.reads[name] = self.reads.get(name, 0) + size
            self.run(SETTLE)
        else:
            self.read(self.prompt[: self.engine.chunk], berths[0])  # packs matrices

    @property
    def bytes(self) -> int:
        """What one step must read, and of states write."""
        return sum(self.reads.values())

    @property
    def step(self) -> Step:
        assert self.engine.forward.latest is not None
        return self.engine.forward.latest

    def turn(self) -> Turn:
        work, bandwidth = self.work, self.meter.bandwidth() if self.work.steps else None
        self.run(SETTLE if work.steps else 0)  # after the measuring nothing else is in the cache
        begin = time.perf_counter()
        self.run(work.steps) if work.steps else self.read(self.prompt, self.berths[0])
        seconds = time.perf_counter() - begin
        share = bandwidth and self.bytes * work.steps / bandwidth / seconds
        tokens = len(self.berths) * (work.steps or work.prompt)
        return Turn(tokens_per_s=tokens / seconds, bandwidth=bandwidth, share=share)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.forward.step(self.berths, [self.next_token() for _ in self.berths])
        for berth in self.berths:
            berth.length = self.work.prompt

    def next_token(self) -> int:
        """A random one, so that a step chooses other experts than the one before."""
        self.drawn = self.drawn or self.meter.tokens(1000)  # at once: no time of a step should go to that
        return self.drawn.pop()

    def read(self, prompt: list[int], berth: Berth) -> None:
        berth.length, chunk = 0, self.engine.chunk
        for low in range(0, len(prompt), chunk):
            part = prompt[low : low + chunk]
            self.engine.forward.read([Part(tokens=part, berth=berth, last=low + chunk >= len(prompt))])

    def fill(self, berth: Berth) -> None:
        """As after a prompt, with random numbers. Codes of fewer bits stay as they are: any are as fast."""
        berth.length, draw = self.work.prompt, self.meter.draw
        for memory in self.engine.berths.layers:
            if isinstance(memory, Pool) and memory.format in WIDE:
                for part in (memory.keys, memory.values):
                    pages = part.view(WIDE[memory.format])
                    size = (len(berth.pages), *pages.shape[1:])
                    pages[berth.pages] = torch.randn(size, generator=draw).to(pages.dtype)
            elif isinstance(memory, MambaSlots):
                for part in (memory.ssm_SHNP, memory.tail_SRC):
                    part[berth.slot].normal_(generator=draw)

    def chosen(self) -> dict[str, float]:
        """How many distinct experts a step reads of each mixer: the mean of some steps that are not replayed."""
        self.run(1)
        step = self.step.recorded
        tape, step.tape, may_record, step.may_record = step.tape, None, step.may_record, False
        try:
            with choices_of(self.engine.model) as counts:
                for _ in range(COUNTED):
                    self.run(1)
        finally:
            step.tape, step.may_record = tape, may_record
        return {name: statistics.mean(found) for name, found in counts.items()}


def require_room(config: Config, works: Sequence[Work], cache: str, state: str) -> None:
    """What an engine would refuse, said before a large model is made or opened."""
    if not works:
        raise UserError("no work to time was asked for; give prompts to read or to decode after")
    longest = max(works, key=lambda work: work.positions)
    if longest.positions > config.positions:
        raise UserError(
            f"{longest.name} was asked for, which takes {longest.positions:,} positions; the model has"
            f" {config.positions:,}: give shorter prompts"
        )
    stored = StateFormat(name=state)
    new_memory(shrink(config), slots=1, pages=1, dtype=torch.float32, cache=cache, state=stored)  # of formats known


def memory_of(config: Config, works: Sequence[Work], itemsize: int) -> int:
    """Bytes of states, keys and values that the works touch, and of what is read to measure the bandwidth."""
    rows = max(work.sequences for work in works)
    tokens = max(work.sequences * work.positions for work in works)
    mamba = [layer for layer in config.layers if isinstance(layer, Mamba)]
    state = sum(4 * layer.inner * layer.state + itemsize * layer.conv_width * (layer.taps - 1) for layer in mamba)
    return READ + rows * state + int(tokens * bytes_per_token(config, itemsize))


# ----- what a step must read -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def choices_of(model: Language) -> Iterator[dict[str, list[int]]]:
    """By mixer, how many distinct experts the rows of each forward pass inside choose."""
    counts: dict[str, list[int]] = {}

    def note(name: str, mixer: ExpertsMixer, inputs: tuple) -> None:
        index_RK, _, _ = mixer.choose(inputs[0].flatten(0, 1))
        counts.setdefault(name, []).append(index_RK.unique().numel())

    with contextlib.ExitStack() as stack:
        for name, mixer in model.experts_mixers().items():
            stack.callback(mixer.register_forward_pre_hook(functools.partial(note, name)).remove)
        yield counts


def weights_read(model: Language, rows: int, chosen: dict[str, float]) -> dict[str, int]:
    """By module, the bytes of its weights that a step of so many rows reads. `chosen`: experts by mixer."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.split(".")[0] == "mtp":  # takes no part in a step
            continue
        if isinstance(module, ExpertWeights):
            every = module.up_proj, module.down_proj, cast(Tensor | tuple | None, module.gate_proj)
            share = chosen[name.rpartition(".")[0]] / len(module.up_proj)
            found[name] = round(share * stored_bytes(every))
        elif isinstance(module, Embedding):
            found[name] = rows * stored_bytes(module.weight) // model.config.vocab
        elif isinstance(module, Matrix):
            found[name] = stored_bytes(module.weight)
        elif own := sum(stored_bytes(parameter) for parameter in module.parameters(recurse=False)):
            found[name] = own
    if model.config.tied:
        found["lm_head"] = stored_bytes(model.head_weight)
    return found


def stored_bytes(matrix: Tensor | Packed | tuple | None) -> int:
    """Of a matrix, in few bits or not, or of those of all experts, as the checkpoint stores them."""
    if isinstance(matrix, tuple):
        return sum(stored_bytes(one) for one in matrix)
    if isinstance(matrix, Packed):
        return sum(stored_bytes(part) for part in (matrix.codes, matrix.scale, matrix.tensor_scale, matrix.zero))
    return 0 if matrix is None else matrix.nbytes


def states_read(engine: Engine, rows: int, length: int) -> dict[str, int]:
    """By module, the bytes of states, which are also written, and of keys and values of rows that are so long."""
    found: dict[str, int] = {}
    for index, (layer, memory) in enumerate(zip(engine.model.config.layers, engine.berths.layers, strict=True)):
        name = f"backbone.layers.{index}.mixer"
        if isinstance(layer, Attention) and isinstance(memory, Pool):
            seen = min(length, layer.window or length)
            found[name] = rows * seen * (memory.keys[0].nbytes + memory.values[0].nbytes) // PAGE
        elif isinstance(memory, MambaSlots | RestingSlots):
            ssm = (memory.ssm_SHNP,) if isinstance(memory, MambaSlots) else memory.ssm.tensors
            found[name] = 2 * rows * sum(part[0].nbytes for part in (memory.tail_SRC, *ssm))
    return found
