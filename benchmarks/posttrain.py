"""What post-training brings at the demo's size, with several seeds: specialists, students, and what else could be made
of as many answers.

    python benchmarks/posttrain.py --out runs/seeds     # about an hour a seed on two cores; goes on where it stopped

Each seed is a demo of its own, from its pretraining on, with the pipeline's baselines beside it and more problems to be
measured on. Points are the mean reward times 100 of answers to 1,024 problems of each task that nobody was trained on.
gain: of the first specialist; recovered: of that gain, what the student of the second iteration has. least: of a
model's tasks the one it is worst at.
The thinking budgets are those the last student is asked with: `rises` says whether no larger budget is worse than a
smaller one beyond their 95 % intervals, `within` whether no turn thought longer than it might.

A seed `holds` where every first specialist gains 15 points or more on its task, the student has at least 0.9 of each
gain, its least is more than that of every specialist, and its budgets rise and are kept. `fails` says what of that is
not so. `--record FILE` appends a seed's rows when it is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recorded import append  # noqa: E402
from train_step import machine  # noqa: E402

SEEDS, MEASURED = (0, 1, 2), 1024  # problems of each task that models are measured on
LAST, GAIN, RECOVERED = "student 2", 15, 0.9


def trained(folder: Path, seed: int) -> dict:
    """The results of the pipeline."""
    words = [f"out={folder}", f"seed={seed}", "then.baselines=true", f"then.measured={MEASURED}"]
    results = folder / "posttrain" / "results.json"
    if not results.is_file():
        subprocess.run([sys.executable, "-m", "nautilus", "demo", *words], check=True)
    return json.loads(results.read_text())


def points(scores: dict, model: str, task: str) -> float:
    return round(100 * scores[model][task]["reward"], 1)


def rows_of(seed: int, found: dict) -> list[dict]:
    """One for each task, and one for the seed."""
    scores, tasks = found["scores"], [*found["scores"]["sft"]]
    rows = []
    for task in tasks:
        base, best = (scores[name][task]["reward"] for name in ("sft", f"{task} specialist 1"))
        gained = (scores[LAST][task]["reward"] - base) / (best - base) if best > base else None
        by_model = {name: points(scores, name, task) for name in scores}
        rows.append({"seed": seed, "task": task, "gain": round(100 * (best - base), 1),
                     "recovered": gained and round(gained, 3), **by_model})  # fmt: skip
    least = {name: min(points(scores, name, task) for task in tasks) for name in scores}
    thinking = budgets(found.get("curve", {}))
    failed = fails(rows, least, thinking)
    known = {"least": least, "budgets": thinking, "holds": not failed, "fails": failed}
    return [*rows, {"seed": seed, **known}]


def budgets(curve: dict) -> dict:
    """By task that thinks."""
    told = {}
    for task in dict.fromkeys(task for by_task in curve.values() for task in by_task):
        line = {budget: by_task[task] for budget, by_task in curve.items()}
        told[task] = {
            "points": {budget: round(100 * one["reward"], 1) for budget, one in line.items()},
            "longest": {budget: one["longest"] for budget, one in line.items()},
            **{name: all(one[name] for one in line.values()) for name in ("rises", "within")},
        }
    return told


def fails(rows: list[dict], least: dict[str, float], thinking: dict) -> list[str]:
    """What does not hold of what should."""
    found = [f"{row['task']}: gain {row['gain']}" for row in rows if row["gain"] < GAIN]
    short = [row for row in rows if row["recovered"] is None or row["recovered"] < RECOVERED]
    found += [f"{row['task']}: recovered {row['recovered']}" for row in short]
    own = {name: value for name, value in least.items() if " specialist " in name}
    found += [f"least {least[LAST]}: {name} {value}" for name, value in own.items() if value >= least[LAST]]
    for task, told in thinking.items():
        found += [f"{task}: not {name}" for name in ("rises", "within") if not told[name]]
    return found if thinking else [*found, "no task thinks"]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args(words)
    print(machine())
    verdicts = []
    for seed in asked.seeds:
        rows = rows_of(seed, trained(asked.out / f"seed-{seed}", seed))
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        append(asked.record, "posttrain.py", words, rows)
        verdicts.append(f"seed {seed}: holds {str(rows[-1]['holds']).lower()}  {'; '.join(rows[-1]['fails'])}".rstrip())
    print(*verdicts, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
