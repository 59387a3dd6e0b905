"""Recorded answers under the measured costs of slices of Nano and Super: what each way to speculate would bring there.

    python benchmarks/verification.py nano super --record costs.jsonl
    python benchmarks/speculation.py                                         # answers of three models trained here
    python benchmarks/replayed.py runs/speculation/* --costs costs.jsonl

No model of that size can be trained here: how much of a draft comes true is that of small models, and what a pass costs
that of the slices. As on a machine with such a model, predictors are trained under these costs, on the answers that
were recorded for that; the answers of the evaluation are replayed. Told are rates by that of plain steps.
`--record FILE` appends the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recorded import append  # noqa: E402

import nautilus  # noqa: E402
from nautilus.posttrain.payoff import Material, rounds, train_paper  # noqa: E402
from nautilus.posttrain.policies import (  # noqa: E402
    Prices,
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
from nautilus.posttrain.rows import split  # noqa: E402
from nautilus.posttrain.traces import read_traces  # noqa: E402
from nautilus.serve.draft.choice import on_grid  # noqa: E402
from nautilus.serve.draft.costs import Costs  # noqa: E402
from nautilus.serve.draft.features import Spelling  # noqa: E402
from nautilus.serve.draft.predictor import Predictor  # noqa: E402
from nautilus.serve.prefixes import fingerprint  # noqa: E402

DEPTHS, DEPTH, DEEPEST, TAUS = (1, 2, 3, 4), 3, 8, (2, 4, 6, 8, 12)


def prices_of(row: dict) -> Prices:
    """In plain steps."""
    costs = Costs()
    costs.seconds = {int(size): ratio for size, (ratio, *_) in row["ratios"].items()}
    return Prices.of(costs, model=row["drafted"]["quarter"])


def trained(folder: Path, prices: Prices, spelling: Spelling, **mine: str) -> tuple[Predictor, Predictor]:
    """Ours, and the paper's."""
    traces = read_traces(folder / "hvd" / "traces.jsonl")
    material = Material(
        traces=traces, parts=split(traces, 0), spelling=spelling, prices=prices, most=on_grid(max(prices.passes) - 1),
        depth=DEPTH if any(trace.depths for trace in traces) else 0, **mine,
    )  # fmt: skip
    return [*rounds(material)][-1], train_paper(material)


def rates(folder: Path, prices: Prices, spelling: Spelling, **mine: str) -> dict[str, float]:
    predictor, paper = trained(folder, prices, spelling, **mine)
    traces, most = read_traces(folder / "speculate" / "traces.jsonl"), predictor.header.grid[-1]
    deep, depth = (count if any(trace.depths for trace in traces) else 0 for count in (DEEPEST, DEPTH))
    policies = {
        "plain": plain, "prompt look-up": prompt_lookup, "all copied drafts": suffix_only,
        **{f"model {count}": model_only(count) for count in DEPTHS if depth},
        "fixed precedence": by_precedence(depth), "by score": by_score(depth=depth),
        **{f"paper, tau {tau}": by_paper(paper, depth, tau) for tau in TAUS},
        "ours": by_rate(predictor, prices, deep),
        "all-knowing": by_oracle(traces, prices, spelling, most=most, depth=deep), "oracle": by_truth(prices, deep),
    }  # fmt: skip
    found = {
        name: simulate(name, traces, policy, prices, spelling, most=most).rate for name, policy in policies.items()
    }
    return {name: rate / found["plain"] for name, rate in found.items()}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", type=Path, help="folders with model, hvd and speculate, each a run")
    parser.add_argument("--costs", type=Path, required=True, help="what verification.py recorded")
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args(words)
    costs = {row["shape"]: row for line in asked.costs.read_text().splitlines() for row in json.loads(line)["rows"]}
    rows = []
    for folder in (folder for folder in asked.targets if (folder / "speculate").is_dir()):
        model, tokenizer = nautilus.load(folder / "model")
        mine = {"target": fingerprint(model), "tokenizer": tokenizer.fingerprint}
        spelling = Spelling(tokenizer)
        for shape, row in costs.items():
            found = rates(folder, prices_of(row), spelling, **mine)
            rows.append(
                {"target": folder.name, "shape": shape, **{name: round(rate, 4) for name, rate in found.items()}}
            )
            told = ", ".join(f"{name} {rate:.2f}" for name, rate in found.items())
            print(f"{folder.name} under the costs of {shape}: {told}", flush=True)
    append(asked.record, "replayed.py", words, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
