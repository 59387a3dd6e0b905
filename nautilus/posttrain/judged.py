"""How well pay-off was predicted, and how fast answers come with it: on requests that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import thread_time

import numpy as np

from nautilus.posttrain.payoff import Material
from nautilus.posttrain.policies import (
    Outcome,
    by_oracle,
    by_paper,
    by_precedence,
    by_rate,
    by_score,
    by_truth,
    model_only,
    plain,
    prompt_lookup,
    simulate,
    suffix_only,
)
from nautilus.posttrain.replay import Policy, replay
from nautilus.posttrain.rows import Rows, rows_of
from nautilus.serve.draft.choice import TAU
from nautilus.serve.draft.predictor import Predictor

HIGH = TAU  # tokens that come true from which on the pay-off is high
BINS = 10  # of what was predicted, in the error of a calibration


@dataclass(frozen=True, kw_only=True)
class Quality:
    """states: that were counted, of which `rows` have a draft; high, chosen: shares of states in which at least HIGH
    tokens come true, in which so many are expected; calibration: (length, predicted, true, error) in the mean."""

    counted: str
    states: int
    rows: int
    error: float
    precision: float
    recall: float
    high: float
    chosen: float
    calibration: Sequence[tuple[int, float, float, float]] = ()


def judge(predictor: Predictor, rows: Rows, counted: str) -> Quality:
    """counted: "place", every place of the answers, or "cycle", where a cycle began."""
    states = rows.positions if counted == "place" else rows.cycles
    rows = rows if counted == "place" else rows.of(rows.cycle)
    pairs = list(zip(rows.features, rows.length.tolist(), strict=True))
    expected = np.array([predictor.expected(features, length) for features, length in pairs])
    high, chosen = rows.true >= HIGH, expected >= HIGH
    both = float((high & chosen).sum())
    return Quality(
        counted=counted, states=states, rows=len(rows),
        error=float(np.abs(expected - rows.true).mean()) if len(rows) else 0.0,
        precision=both / max(1, chosen.sum()), recall=both / max(1, high.sum()),
        high=float(high.sum() / max(1, states)), chosen=float(chosen.sum() / max(1, states)),
        calibration=calibration(predictor, rows) if predictor.header.mode == "survival" else (),
    )  # fmt: skip


def calibration(predictor: Predictor, rows: Rows) -> list[tuple[int, float, float, float]]:
    """For each length of the grid, of drafts that are as long: what was predicted, what came true, and by how much the
    two differ in the mean over parts of what was predicted."""
    pairs, deepest = zip(rows.features, rows.length.tolist(), strict=True), predictor.header.grid[-1]
    survival = [[*found, *[0.0] * (deepest - len(found))] for found in (predictor.survival(*pair) for pair in pairs)]
    said_NL, found = np.array(survival).reshape(len(rows), deepest), []
    for size in predictor.header.grid:
        long = rows.length >= size
        if long.any():
            said, true = said_NL[long, size - 1], rows.true[long] >= size
            bins = np.minimum((BINS * said).astype(int), BINS - 1)
            errors = [abs((said - true)[bins == one].sum()) for one in range(BINS)]
            found.append((size, float(said.mean()), float(true.mean()), float(sum(errors) / long.sum())))
    return found


def qualities(material: Material, predictor: Predictor, policy: Policy) -> list[Quality]:
    """Of the states of the policy that uses it, on the requests that are reported on."""
    of = material.parts.test
    rows = rows_of(material.traces, policy, material.spelling, most=material.most, of=of, every=True)
    return [judge(predictor, rows, counted) for counted in ("place", "cycle")]


def timed(material: Material, policy: Policy) -> Material:
    """With the seconds that it takes here to look for a draft and to decide, whatever else this machine does."""
    begin, cycles = thread_time(), 0
    for _ in replay(material.traces, policy, material.spelling, most=material.most, of=material.parts.test):
        cycles += 1
    return replace(material, prices=replace(material.prices, look=(thread_time() - begin) / max(1, cycles)))


def outcomes(material: Material, survival: Predictor, paper: Predictor) -> list[Outcome]:
    """How fast the requests that are reported on come under each policy; the last knows what copied drafts come true,
    the one before the paper's all that will."""
    depth, prices, of = material.depth, material.prices, material.parts.test
    where = {"most": material.most, "of": of}
    looking = {
        "prompt look-up": prompt_lookup, "all copied drafts": suffix_only, "fixed precedence": by_precedence(depth),
        "by score": by_score(depth=depth),
    }  # fmt: skip
    models = {f"model, {depth} tokens": model_only(depth)} if depth else {}
    knowing = {
        "all-knowing": by_oracle(material.traces, prices, material.spelling, **where, depth=depth),
        "oracle": by_truth(prices, depth),
    }
    ours = {"paper": by_paper(paper, depth), "by rate": by_rate(survival, prices, depth)}
    found = []
    for name, policy in ({"plain": plain} | looking | models | knowing | ours).items():
        look = name in looking or name in ours
        found.append(simulate(name, material.traces, policy, prices, material.spelling, **where, look=look))
        if name in knowing:  # what they do not copy they do not look for
            found[-1].seconds += prices.look * found[-1].cycles["cache"]
    return sorted(found, key=lambda one: one.name == "oracle")
