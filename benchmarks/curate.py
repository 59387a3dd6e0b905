"""Curation of generated text: rate, and the memory of each process while the text is larger than that.

    python benchmarks/curate.py [megabytes [workers [folder]]]

Writes pages of invented words, one in ten an equal or a near copy of another, one in 500 with a run of words from a
small evaluation set, curates them with every filter against that set, and prints one line of JSON. Memory is what the
kernel says of the largest process, of this one and of the workers. In a folder that is given the same command goes on
where an interrupted one stopped; seconds are those of the last one.

Two workers on two cores that others were using too: 1,000 MB of text in 283 MB of memory each, in 20 minutes; all of
48,989 planted copies and 871 contaminated pages were dropped and no other page (`records/curate.jsonl`). With one
worker 8 MB of text take 278 MB of memory.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from nautilus.recipes.curate import Settings, main

COMMON = (
    "the of and a to in is that it was for on are as with his they at be this from have or by one had not but".split()
)


def words(rng: random.Random, count: int) -> list[str]:
    letters = "aaabcdeeefghiiijklmnooopqrstuuvwxyz"
    return ["".join(rng.choices(letters, k=rng.randint(3, 10))) for _ in range(count)]


def write_pages(path: Path, size: int, rng: random.Random, secret: list[str]) -> dict[str, int]:
    """JSONL files of 256 MB at most; how many copies and how many pages with a part of `secret` are among them."""
    rare, held, planted, done, number = words(rng, 50_000), [], {"copies": 0, "contaminated": 0}, 0, 0
    path.mkdir(parents=True)
    while done < size:
        with open(path / f"{number:03d}.jsonl", "w") as file:
            number += 1
            here = 0
            while here < min(size - done, 256 << 20):
                if held and rng.random() < 0.1:
                    planted["copies"] += 1
                    text = rng.choice(held) + rng.choice(["", " And some more."])
                else:
                    lines = [" ".join(rng.choices(rare, k=8) + rng.choices(COMMON, k=6)) for _ in range(24)]
                    if contaminated := rng.random() < 0.002:
                        begin = rng.randrange(len(secret) - 20)
                        lines[rng.randrange(24)] += " " + " ".join(secret[begin : begin + 20])
                        planted["contaminated"] += 1
                    text = "\n".join(line.capitalize() + "." for line in lines)
                    if len(held) < 2000 and not contaminated:
                        held.append(text)
                here += file.write(json.dumps({"text": text}) + "\n")
            done += here
    return planted


def peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def prepare(folder: Path, size: int) -> dict[str, int]:
    """The text and the evaluation set, unless they are there; what was planted."""
    said = folder / "planted.json"
    if not said.exists():
        shutil.rmtree(folder, ignore_errors=True)
        rng = random.Random(0)
        secret = words(rng, 200)
        planted = write_pages(folder / "in", size, rng, secret)
        (folder / "eval.jsonl").write_text(json.dumps({"text": " ".join(secret)}) + "\n")
        said.write_text(json.dumps(planted))
    return json.loads(said.read_text())


if __name__ == "__main__":
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 1000) * 1e6)
    workers = int(sys.argv[2] if len(sys.argv) > 2 else 1)
    kept = len(sys.argv) > 3
    folder = Path(sys.argv[3]) if kept else Path(tempfile.mkdtemp(prefix="nautilus-curate-"))
    try:
        planted = prepare(folder, size)
        began = time.monotonic()
        asked = {"data": (str(folder / "in"),), "against": (str(folder / "eval.jsonl"),), "workers": workers}
        main(Settings(out=folder / "out", **asked))
        seconds = time.monotonic() - began
        found = json.loads((folder / "out" / "curation.json").read_text())
        row = {"megabytes": size / 1e6, "workers": workers, "seconds": round(seconds, 1), "planted": planted}
        row |= {"mb_per_s": round(size / 1e6 / seconds, 3), "found": found["before"]["documents"]}
        row |= {"kept": found["after"]["documents"], "dropped": found["dropped"]["dropped"]}
        row |= {
            "largest_worker_mb": round(peak(resource.RUSAGE_CHILDREN)),
            "parent_mb": round(peak(resource.RUSAGE_SELF)),
        }
        print(json.dumps(row))
    finally:
        if not kept:
            shutil.rmtree(folder)
