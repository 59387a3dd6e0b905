"""The pay-off of a copied draft, predicted from its features by a small network. Letters: F features, H hidden units,
G lengths of the grid, K knots.

Mode "paper" is that of Hybrid Verified Decoding (arXiv 2606.01019): one output, how many tokens of the draft will come
true. Mode "survival" tells with which probability at least b of them do, for every length b of a grid: its outputs are
hazards, that a draft which came true up to the length before does not up to this one,

    S(b) = (1 - h_1) (1 - h_2) .. (1 - h_b)

and each S(b) is then replaced by what such values stood for on requests that were not trained on, along a line between
knots (isotonic calibration).

A predictor is one safetensors file. It holds for one model, one tokenizer and one version of the features.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nautilus.runtime import UserError, write_atomic
from nautilus.serve.draft.features import NAMES, VERSION

MODES = "paper", "survival"
LAYERS = 3
WIDEST = 4096  # of a tensor, or its file is damaged
STEEP = 30.0  # a logit beyond which nothing changes
AGAIN = "train one for it with `nautilus hvd train`"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a predictor is for. target: `nautilus.serve.prefixes.fingerprint` of the model; tokenizer: fingerprint."""

    mode: str
    target: str
    tokenizer: str
    grid: tuple[int, ...]
    version: int = VERSION


class Predictor:
    """tensors: means (F) and scales (F) of the features; weight_i (H, F), bias_i (H) of the layers; in survival mode
    also knots (G, K, 2): what is predicted, what it stands for, both rising."""

    def __init__(self, header: Header, tensors: Mapping[str, np.ndarray]):
        self.header = header
        self.tensors: dict[str, np.ndarray] = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        weights, biases = ([self.tensors[f"{name}_{at}"] for at in range(LAYERS)] for name in ("weight", "bias"))
        weights[0] = weights[0] / self.tensors["scales"]
        biases[0] = biases[0] - weights[0] @ self.tensors["means"]
        self.layers = [*zip(weights, biases, strict=True)]
        knots = self.tensors["knots"] if header.mode == "survival" else ()
        self.knots: list[tuple[list[float], list[float]]] = [
            (rows[:, 0].tolist(), rows[:, 1].tolist()) for rows in knots
        ]

    def outputs(self, features_F: np.ndarray) -> np.ndarray:
        """(1) expected tokens, or (G) logits of the hazards; of many rows (.., F) as many."""
        hidden = features_F
        for weight, bias in self.layers[:-1]:
            hidden = np.maximum(hidden @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        return hidden @ weight.T + bias

    def uncalibrated(self, features_F: np.ndarray) -> np.ndarray:
        """S(b) of the grid, (G) or (.., G), as the network has it."""
        logits_G = np.clip(self.outputs(features_F), -STEEP, STEEP)
        return np.cumprod(1 / (1 + np.exp(logits_G)), axis=-1)

    def survival(self, features_F: np.ndarray, length: int) -> list[float]:
        """In survival mode: the probabilities that the first, the first two .. of `length` draft tokens come true. Of
        lengths beyond the grid nothing is known, and nothing is told."""
        found, last, before, raw = [], 1.0, 0, 1.0
        for size, logit, (said, stood_for) in zip(
            self.header.grid, self.outputs(features_F).tolist(), self.knots, strict=True
        ):
            raw /= 1 + math.exp(min(max(logit, -STEEP), STEEP))
            value = min(last, on_line(raw, said, stood_for))
            step = (value - last) / (size - before)
            found += [*(last + step * ahead for ahead in range(1, size - before)), value]
            if size >= length:
                break
            last, before = value, size
        return found[:length]

    def expected(self, features_F: np.ndarray, length: int) -> float:
        """How many of `length` draft tokens come true."""
        if self.header.mode == "paper":
            return min(max(0.0, float(self.outputs(features_F)[0])), float(length))
        return sum(self.survival(features_F, length))

    def save(self, path: Path) -> None:
        write_atomic(path, save(self.tensors, {"payoff": json.dumps(dataclasses.asdict(self.header))}))


def on_line(value: float, knots: Sequence[float], heights: Sequence[float]) -> float:
    """Between two knots on the line between them, outside as at the nearest one."""
    at = bisect_right(knots, value)
    if at == 0 or at == len(knots):
        return heights[max(0, at - 1)]
    share = (value - knots[at - 1]) / (knots[at] - knots[at - 1])
    return heights[at - 1] + share * (heights[at] - heights[at - 1])


# ----- files ----------------------------------------------------------------------------------------------------------


def load_predictor(path: Path, *, target: str, tokenizer: str) -> Predictor:
    """UserError for a file that is none, is damaged, or was made for another model, tokenizer or kind of features."""
    try:
        with safe_open(path, framework="np") as file:
            header = header_of(file.metadata() or {}, path)
            refuse_other(header, path, target=target, tokenizer=tokenizer)
            return Predictor(header, tensors_of(file, header))
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as bad:
        raise UserError(f"{path} is no predictor of pay-off, or is damaged ({bad}); copy it again, or {AGAIN}") from bad


def header_of(metadata: Mapping[str, str], path: Path) -> Header:
    if "payoff" not in metadata:
        raise UserError(f"{path} is a safetensors file, but no predictor of pay-off; {AGAIN}")
    said: dict[str, Any] = json.loads(metadata["payoff"])
    if said.get("version") != VERSION:
        had = said.get("version")
        raise UserError(f"{path} was trained on features of version {had}, here they have version {VERSION}; {AGAIN}")
    header = Header(**{**said, "grid": tuple(said["grid"])})
    if header.mode not in MODES or not all(isinstance(size, int) and 0 < size <= WIDEST for size in header.grid):
        raise ValueError(f"mode {header.mode!r}, grid {header.grid}")
    if not header.grid or any(size <= before for before, size in zip(header.grid, header.grid[1:], strict=False)):
        raise ValueError(f"the grid {header.grid} does not rise")
    return header


def refuse_other(header: Header, path: Path, **asked: str) -> None:
    for name, wanted in asked.items():
        if (had := getattr(header, name)) != wanted:
            what = "model" if name == "target" else name
            raise UserError(f"{path} was trained for another {what} ({had!s:.12}, this one is {wanted:.12}); {AGAIN}")


def tensors_of(file: Any, header: Header) -> dict[str, np.ndarray]:
    """Those of a predictor, all of them finite, of shapes that fit each other."""
    found: dict[str, np.ndarray] = {}
    for name in sorted(file.keys()):
        shape = file.get_slice(name).get_shape()
        if not 0 < min(shape, default=0) <= max(shape) <= WIDEST:
            raise ValueError(f"{name} of shape {tuple(shape)}")
        found[name] = file.get_tensor(name)
    widths = [len(NAMES), *(len(found[f"bias_{at}"]) for at in range(LAYERS))]
    shapes: dict[str, tuple[int, ...]] = {"means": (len(NAMES),), "scales": (len(NAMES),)}
    for at in range(LAYERS):
        shapes |= {f"weight_{at}": (widths[at + 1], widths[at]), f"bias_{at}": (widths[at + 1],)}
    if header.mode == "survival":
        shapes["knots"] = (len(header.grid), found["knots"].shape[1], 2)
    if widths[-1] != (1 if header.mode == "paper" else len(header.grid)):
        raise ValueError(f"{widths[-1]} outputs in mode {header.mode}")
    for name, shape in shapes.items():
        if found[name].shape != shape or found[name].dtype != np.float32 or not np.isfinite(found[name]).all():
            raise ValueError(f"{name} of shape {found[name].shape}, {found[name].dtype}")
    if (found["scales"] <= 0).any() or ("knots" in shapes and (np.diff(found["knots"], axis=1) < 0).any()):
        raise ValueError("scales or knots that cannot be")
    return {name: found[name] for name in shapes}
