"""A predictor of pay-off, trained on recorded answers. Letters: N rows, F features, H hidden units, G lengths, K knots.

Mode "paper", after Hybrid Verified Decoding (arXiv 2606.01019): the squared error of the number of true draft tokens,
over every place of the answers. Its optimiser and inputs are not told there: Adam and standardised ones here.

Mode "survival": of a draft that came true up to one length of the grid, whether it does up to the next one too (binary
cross entropy). A draft that is shorter than a length says nothing of it. History depends on the policy, so rows are
the cycles of one that knows scores, then those of the predictor trained on these as well, and so on; all rows count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from nautilus.posttrain.policies import Prices, by_rate, by_score
from nautilus.posttrain.rows import Parts, Rows, joined, rows_of
from nautilus.posttrain.traces import Trace
from nautilus.runtime import UserError
from nautilus.serve.draft.choice import GRID
from nautilus.serve.draft.features import NAMES, Spelling
from nautilus.serve.draft.predictor import Header, Predictor

KNOTS = 32  # of a calibration
TRUST = 4.0  # rows that count for what the network says, in each part of a calibration
ROUNDS = 3  # trainings, the first on rows of a policy that knows scores
PARTS = 16  # updates of an epoch at least: published batches are for millions of rows
LOOK, PATIENCE = 25, 8  # updates after which held rows are looked at, and how often without getting better


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a mode is trained. batch: rows of an update, or fewer, so that an epoch has PARTS of them at least."""

    hidden: int
    batch: int
    epochs: int = 20
    lr: float = 1e-3
    decay: float = 0.0


PLANS = {
    "paper": Plan(hidden=256, batch=65_536),
    "survival": Plan(hidden=64, batch=1024, lr=3e-3, decay=0.01),
}


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a predictor is trained from. most: draft tokens, one of GRID; depth: those of a model's drafts
    where traces tell of them; target, tokenizer: fingerprints of what it is for."""

    traces: Sequence[Trace]
    parts: Parts
    spelling: Spelling
    prices: Prices
    most: int
    target: str
    tokenizer: str
    depth: int = 0
    seed: int = 0

    def header(self, mode: str) -> Header:
        grid = GRID[: GRID.index(self.most) + 1]
        return Header(mode=mode, target=self.target, tokenizer=self.tokenizer, grid=grid)


def train_paper(material: Material) -> Predictor:
    policy, of = by_score(depth=material.depth), material.parts.train | material.parts.calibrate
    rows = rows_of(material.traces, policy, material.spelling, most=material.most, of=of, every=True)
    return fit(rows, material.header("paper"), seed=material.seed)


def rounds(material: Material) -> Iterator[Predictor]:
    """One predictor after another, each trained on the rows of the first policy and those of the predictors before."""
    parts, policy, found = material.parts, by_score(depth=material.depth), []
    for _ in range(ROUNDS):
        of = parts.train | parts.calibrate
        found.append(rows_of(material.traces, policy, material.spelling, most=material.most, of=of))
        rows = joined(found)
        held = rows.among(parts.calibrate)
        learned, some = rows.among(parts.train), held if len(held) else None
        predictor = calibrated(fit(learned, material.header("survival"), seed=material.seed, held=some), held)
        policy = by_rate(predictor, material.prices, material.depth)
        yield predictor


# ----- the network ----------------------------------------------------------------------------------------------------


def fit(rows: Rows, header: Header, *, seed: int, held: Rows | None = None) -> Predictor:
    """Not calibrated: what it says stands for itself. held: rows on which the weights that are kept were best; training
    ends where these get no better."""
    if not len(rows):
        raise UserError("in these answers nothing is repeated, so there is nothing to learn; record more, or others")
    plan, generator = PLANS[header.mode], torch.Generator().manual_seed(seed)
    rows = rows.thinned(seed) if header.mode == "survival" else rows
    means, scales = rows.features.mean(0), rows.features.std(0)
    same = scales <= 1e-6
    scales = np.where(same, 1, scales).astype(np.float32)
    outputs = 1 if header.mode == "paper" else len(header.grid)
    network = network_of(plan.hidden, outputs, generator, torch.from_numpy(same))
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.lr, weight_decay=plan.decay)
    learned, asked = (tensors_of(some, means, scales) if some is not None else None for some in (rows, held))
    assert learned is not None
    best, since, kept = math.inf, 0, state_of(network)
    for update, chosen in enumerate(batches(len(rows), plan, generator), 1):
        loss = loss_of(network, header, *(values[chosen] for values in learned))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if asked is not None and update % LOOK == 0:
            with torch.no_grad():
                found = float(loss_of(network, header, *asked))
            best, since, kept = (found, 0, state_of(network)) if found < best else (best, since + 1, kept)
            if since == PATIENCE:
                break
    if best < math.inf:
        network.load_state_dict(kept)
    return predictor_of(network, header, means, scales)


def tensors_of(rows: Rows, means: np.ndarray, scales: np.ndarray) -> list[Tensor]:
    features_NF = (rows.features - means) / scales
    return [torch.from_numpy(values) for values in (features_NF, rows.true, rows.length, rows.weight)]


def state_of(network: nn.Sequential) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def predictor_of(network: nn.Sequential, header: Header, means: np.ndarray, scales: np.ndarray) -> Predictor:
    tensors = {"means": means, "scales": scales, "knots": straight(len(header.grid))}
    for at, layer in enumerate(layer for layer in network if isinstance(layer, nn.Linear)):
        tensors |= {f"weight_{at}": layer.weight.detach().numpy(), f"bias_{at}": layer.bias.detach().numpy()}
    return Predictor(header, tensors)


def network_of(hidden: int, outputs: int, generator: torch.Generator, same_F: Tensor) -> nn.Sequential:
    """same: features that are always the same here, of which nothing is learned, nor guessed."""
    widths, layers = [len(NAMES), hidden, hidden, outputs], []
    for inside, out in zip(widths, widths[1:], strict=False):
        layer = nn.Linear(inside, out)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / inside), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    nn.init.zeros_(layers[-2].weight)  # at first nothing is known of any draft
    layers[0].weight.data[:, same_F] = 0
    return nn.Sequential(*layers[:-1])


def batches(rows: int, plan: Plan, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(plan.epochs):
        yield from torch.randperm(rows, generator=generator).split(min(plan.batch, math.ceil(rows / PARTS)))


def loss_of(
    network: nn.Sequential, header: Header, features_NF: Tensor, true_N: Tensor, length_N: Tensor, weight_N: Tensor
) -> Tensor:
    said = network(features_NF)
    if header.mode == "paper":
        return (said[:, 0] - true_N).square().mean()
    return stopping(said, true_N, length_N, weight_N, header.grid)


def stopping(said_NG: Tensor, true_N: Tensor, length_N: Tensor, weight_N: Tensor, grid: Sequence[int]) -> Tensor:
    """Cross entropy of whether a draft stops before a length, where it reached the one before and is long enough."""
    grid_G, before_G = torch.tensor(grid), torch.tensor([0, *grid[:-1]])
    stops_NG = (true_N[:, None] < grid_G).float()
    counts_NG = weight_N[:, None] * ((true_N[:, None] >= before_G) & (length_N[:, None] >= grid_G))
    losses_NG = binary_cross_entropy_with_logits(said_NG, stops_NG, reduction="none")
    return (losses_NG * counts_NG).sum() / counts_NG.sum().clamp(min=1)


# ----- calibration ----------------------------------------------------------------------------------------------------


def straight(lengths: int) -> np.ndarray:
    """Knots with which everything stands for itself."""
    return np.tile(np.linspace(0, 1, KNOTS, dtype=np.float32)[:, None], (lengths, 1, 2))


def calibrated(predictor: Predictor, rows: Rows) -> Predictor:
    """What S(b) stood for on these rows, for each b of the grid on its own, from drafts that are as long."""
    raw_NG, knots = predictor.uncalibrated(rows.features), []
    for at, size in enumerate(predictor.header.grid):
        long = rows.length >= size
        knots.append(isotonic(raw_NG[long, at], rows.true[long] >= size, rows.weight[long]))
    return Predictor(predictor.header, {**predictor.tensors, "knots": np.stack(knots)})


def isotonic(said_N: np.ndarray, true_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """Knots (K, 2): what was said, what it stood for, rising. Rows are put together in the order of what was said, and
    neighbours that fall are pooled. Where there are no rows nothing comes true."""
    order, knots = np.argsort(said_N, kind="stable"), []
    for part in np.array_split(order, min(KNOTS, len(order))) if len(order) else ():
        weight = weight_N[part].sum()
        said = float((said_N[part] * weight_N[part]).sum() / weight)
        stood_for = ((true_N[part] * weight_N[part]).sum() + TRUST * said) / (weight + TRUST)
        knots.append((said, float(stood_for), float(weight + TRUST)))
    knots = knots or [(0.0, 0.0, 1.0)]
    heights = pooled([height for _, height, _ in knots], [weight for *_, weight in knots])
    found = [(said, height) for (said, *_), height in zip(knots, heights, strict=True)]
    return np.array(found + found[-1:] * (KNOTS - len(found)), np.float32)


def pooled(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The rising values next to these by weighted squares: neighbours that fall get their mean, until none do."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, light, few), (high, heavy, many) = blocks.pop(), blocks.pop()
            total = light + heavy
            blocks.append(((low * light + high * heavy) / total, total, few + many))
    return [value for value, _, count in blocks for _ in range(count)]
