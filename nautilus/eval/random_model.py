"""A model of a preset's sizes with random weights, for measuring speed: made fast, in any number format."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nautilus.config import Config
from nautilus.model.initialise import initial_value, seeded
from nautilus.model.language import Language
from nautilus.model.linear import Linear
from nautilus.model.moe import ExpertWeights
from nautilus.ops.encode import encode
from nautilus.ops.formats import FORMATS, Packed, columns
from nautilus.runtime import UserError
from nautilus.serve.memory import memory_bytes

WIDE = {"bf16": torch.bfloat16, "f32": torch.float32}
SAMPLE = 16  # rows that are drawn; the others of a matrix repeat them


def random_model(config: Config, format: str, seed: int = 0, *, mtp: bool = False) -> Language:
    """In bf16 or f32; or in bf16 but for experts and linear matrices, which are in a format of few bits. The block of
    multi-token prediction, which takes no part in a step, is there with `mtp`. ValueError for what is no format."""
    config = config if mtp else dataclasses.replace(config, mtp=())
    model, draw = outline(config, format), torch.Generator().manual_seed(seed)
    std = config.std
    for module in model.modules() if format in FORMATS else ():
        if isinstance(module, Linear):
            module.hold(random_packed(module.weight.shape, format, std, draw))
        elif isinstance(module, ExpertWeights):
            for name, stack in list(module.named_parameters(recurse=False)):
                module.hold(name, tuple(random_packed(stack.shape[1:], format, std, draw) for _ in stack))
    model.to_empty(device="cpu").requires_grad_(False)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".experts." in name:
            fill(tensor.flatten(0, 1), std, draw)
        elif tensor.ndim == 2:
            tensor.normal_(std=std, generator=draw)
        else:
            tensor.copy_(initial_value(name, tensor.shape, std, len(config.layers), seeded(seed, name)))
    return model.eval()


def outline(config: Config, format: str) -> Language:
    """The model without memory."""
    if format not in WIDE and format not in FORMATS:
        raise UserError(f"random weights in {format!r} were asked for; choose one of {', '.join((*WIDE, *FORMATS))}")
    return Language(config, dtype=WIDE.get(format, torch.bfloat16), device="meta")


def random_packed(shape: Sequence[int], format: str, std: float, draw: torch.Generator) -> Packed:
    rows, width = shape
    sample = encode(std * torch.randn(min(rows, SAMPLE), width, generator=draw), format)
    return sample.rows(torch.arange(rows) % SAMPLE)


def fill(matrix: Tensor, std: float, draw: torch.Generator) -> None:
    sample = std * torch.randn(min(len(matrix), SAMPLE), matrix.shape[1], generator=draw)
    for part in matrix.split(SAMPLE):
        part.copy_(sample[: len(part)])


# ----- whether it fits -----------------------------------------------------------------------------------------------


def require_memory(name: str, config: Config, format: str, beside: int) -> None:
    """UserError, before anything is allocated, where the model and so many bytes beside it do not fit."""
    weights, packed = bytes_of(config, format)
    needed, free = weights + packed + beside, free_bytes()
    if needed > free:
        raise UserError(
            f"{name} ({len(config.layers)} layers, vocabulary {config.vocab:,}) with random weights in {format} was"
            f" asked for; it takes {needed / 1e9:,.1f} GB (weights {weights / 1e9:,.1f}, laid out for kernels once more"
            f" {packed / 1e9:,.1f}, states, keys, values and buffers {beside / 1e9:,.1f}), {free / 1e9:,.1f} GB are"
            f" free: give fewer layers (such as layers={config.pattern[:4]}), a smaller vocab, fewer bits"
            f" (format=nvfp4), or shrink=true"
        )


def bytes_of(config: Config, format: str) -> tuple[int, int]:
    """Of the weights; and of the second form in which an engine packs matrices."""
    weights = packed = 0.0
    for module in outline(config, format).modules():
        few = format in FORMATS and isinstance(module, Linear | ExpertWeights)
        for parameter in module.parameters(recurse=False):
            bits = bits_of(format, parameter.shape[-1]) if few else 8 * parameter.itemsize
            weights += parameter.numel() * bits / 8
            packed += parameter.numel() * bits / 8 if isinstance(module, Linear | ExpertWeights) else 0
    return round(weights), round(packed)


def bits_of(format: str, width: int) -> float:
    """Of a number, its share of the scale that it has in common with others included."""
    kind, tile = FORMATS[format], FORMATS[format].tiles[0]
    code = 4 if kind.nibbles else 8 * kind.codes.itemsize
    return code if tile == "tensor" else code + 8 * kind.scale.itemsize / columns(tile, width)


def free_bytes() -> int:
    """What Linux says can still be had; elsewhere all the memory there is."""
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read_text() if file.exists() else "", re.MULTILINE)
    return 1024 * int(found[1]) if found else memory_bytes()
