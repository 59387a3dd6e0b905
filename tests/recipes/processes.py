"""Training whose answers two processes of Ray draw, one of which is killed on the way; what came of it, as a line of
JSON. Arguments: a run to begin from, and a folder for those that are made."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

import nautilus
from nautilus.recipes import rlvr
from nautilus.runtime import read_metrics
from nautilus.tasks.letters import Count
from nautilus.tasks.named import TASKS

HERE = os.getpid()
TAUGHT, OUT = Path(sys.argv[1]), Path(sys.argv[2])
HOW = {
    "tasks": ("fatal:3",), "prompts": 4, "group": 4, "problems": 40, "tokens": 200, "turn_tokens": 12, "steps": 2,
    "measured": 2,
}  # fmt: skip


class Fatal(Count):
    """Ends the first process that judges an answer, if that is not this one."""

    name = "fatal"

    def grade(self, problem, reply):
        if os.getpid() != HERE:
            with contextlib.suppress(FileExistsError):
                (OUT / "ended").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().grade(problem, reply)


def trained(name: str, **more) -> tuple[list[dict], list[dict]]:
    """Lines of its rollouts, and of its metrics."""
    rlvr.main(rlvr.Settings(model=str(TAUGHT), out=OUT / name, **HOW, **more))
    lines = [json.loads(line) for line in (OUT / name / "rollouts.jsonl").read_text().splitlines()]
    return lines, read_metrics(OUT / name / "metrics.jsonl")


def found() -> dict:
    plain, _ = trained("plain")
    lines, rows = trained("actors", actors=2)
    one, other = (nautilus.load(OUT / name)[0].state_dict() for name in ("plain", "actors"))
    lost = [line for line in lines if "lost" in line]
    ahead, later = trained("ahead", actors=2, age=1)
    return {
        "same": [line for line in lines if "lost" not in line] == plain,
        "weights": all(torch.equal(one[name], other[name]) for name in one),
        "lost": sum(line["lost"] for line in lost),
        "to": sorted({line["to"] for line in lost}),
        "shares": [row["lost"] for row in rows],
        "mismatch": [row["mismatch"] for row in rows],
        "ages": [line["step"] - line["version"] for line in ahead],
        "steps": [row["step"] for row in later],
    }


if __name__ == "__main__":
    TASKS["fatal"] = Fatal
    print(json.dumps(found()))
