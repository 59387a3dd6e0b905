"""Every way to speculate, on three models trained here: a hybrid with multi-token prediction, a dense one, a Llama.

    python benchmarks/speculation.py                       # all three, some hours; begun again it goes on
    python benchmarks/speculation.py hybrid --each 8       # one of them, fewer prompts

Each is trained on documents of six families (`nautilus/eval/made.py`). A step of a model that is trained in minutes
takes 0.1 ms, less than what Python does beside it, and nothing could be said of models that people serve; so each is
widened without a change of what it says (Net2WiderNet, arXiv 1511.05641: every hidden unit of its MLPs and experts
comes many times, and counts so much less), until a step takes some milliseconds. A head and predictors are trained on
its own answers, and it answers other prompts of the same families with every arm (`nautilus speculate`).
Told are speed-ups with 95 % intervals, and beside them what was aimed at:

    plain        the lower end of ours / plain, least of all families       0.98
    model        ours / the best of the block's or head's depths alone      1.5 on edits and agents
    oracle       ours / who knows how much of a copied draft comes true     0.9 over all prompts
    predictor    precision and recall of six tokens or more                 the paper: 0.78-0.88, 0.61-0.80

`--record FILE` appends the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recorded import append  # noqa: E402

import nautilus  # noqa: E402
from nautilus.config import Attention, Config, Experts, Layer, Mamba, Mlp, Rotary, lay  # noqa: E402
from nautilus.eval.families import FAMILIES  # noqa: E402
from nautilus.eval.made import prompts, training_documents  # noqa: E402
from nautilus.model.eagle import load_eagle  # noqa: E402
from nautilus.model.language import Language  # noqa: E402
from nautilus.recipes import eagle, hvd, pretrain, speculate  # noqa: E402
from nautilus.runtime import Run, write_atomic  # noqa: E402
from nautilus.train.optim import OptimConfig  # noqa: E402

MAMBA = Mamba(heads=8, head_width=32, state=32, groups=1, chunk=64)
ATTENTION = Attention(heads=4, groups=2, head_width=32)
EXPERTS = Experts(experts=8, active=2, hidden=128, shared=128, scale=2.5)
SIZES, LENGTH = {"vocab": 1024, "width": 128, "positions": 1 << 16}, 512  # LENGTH: of a row in training
TIMES = {"hybrid": 256, "dense": 192, "llama": 96}  # that a hidden unit comes in the end
PART = 6  # of these in the prediction block: it has one layer of experts beside the model's two, others have one in 23
KNOW = "oracle", "all-knowing"  # arms that are told the future
LINE, LONG = (8, 24), 14  # words of a line that comes twice, letters of a word that is too long for it


def targets() -> dict[str, Config]:
    """About a million weights each."""
    turned = replace(ATTENTION, rotary=Rotary())
    return {
        "hybrid": Config(**SIZES, layers=lay("M*EM*E", MAMBA, ATTENTION, EXPERTS), mtp=lay("*E", ATTENTION, EXPERTS)),
        "dense": Config(**SIZES, layers=lay("M*-M*-", MAMBA, ATTENTION, Mlp(hidden=512))),
        "llama": Config(**SIZES, layers=lay("*-" * 4, turned, Mlp(hidden=352, gated=True))),
    }


def text(folder: Path, count: int) -> list[Path]:
    """Documents of the families, and lines of words that come twice: from these a model learns within minutes to go on
    as what stood there before did, which takes it far longer from the others alone."""
    found = [folder / "documents.jsonl", folder / "twice.jsonl"]
    if not all(path.is_file() for path in found):
        folder.mkdir(parents=True, exist_ok=True)
        documents, draw = [*training_documents(count)], random.Random(0)
        words = sorted({word for each in documents[:2000] for word in each.split() if len(word) < LONG})
        lines = (" ".join(draw.choices(words, k=draw.randint(*LINE))) + "\n" for _ in range(count))
        for path, texts in zip(found, (documents, (2 * line for line in lines)), strict=True):
            write_atomic(path, "".join(json.dumps({"text": each}) + "\n" for each in texts))
    return found


def asked(folder: Path, each: int) -> Path:
    """Prompts that predictors and heads learn from: none of those that are evaluated."""
    path = folder / "prompts.jsonl"
    if not path.is_file():
        found = [one for family in FAMILIES for one in prompts(family, each, seed=1)]
        write_atomic(path, "".join(json.dumps({"prompt": one.prompt}) + "\n" for one in found))
    return path


def widened(model: Language, times: int) -> Language:
    """The model with every hidden unit so many times: what comes out of each is divided by that."""
    factor = lambda name: max(1, times // PART) if name.startswith("mtp.") else times
    weights = {name: wider(name, tensor, factor(name)) for name, tensor in model.state_dict().items()}
    layers = tuple(wide_layer(layer, times) for layer in model.config.layers)
    block = tuple(wide_layer(layer, max(1, times // PART)) for layer in model.config.mtp)
    other = Language(replace(model.config, layers=layers, mtp=block))
    other.load_state_dict(weights)
    return other


def wide_layer(layer: Layer, times: int) -> Layer:
    if isinstance(layer, Experts):
        return replace(layer, hidden=layer.hidden * times, shared=layer.shared * times)
    return replace(layer, hidden=layer.hidden * times) if isinstance(layer, Mlp) else layer


def wider(name: str, tensor: Tensor, times: int) -> Tensor:
    if "up_proj" in name or "gate_proj" in name:
        return tensor.repeat(*[1] * (tensor.ndim - 2), times, 1)
    return tensor.repeat(*[1] * (tensor.ndim - 1), times) / times if "down_proj" in name else tensor


def carried_through(name: str, config: Config, wanted: argparse.Namespace) -> dict:
    """From text to the report. What can be, is learned beside the small model, which says the same."""
    folder, documents = wanted.folder / name, [*map(str, text(wanted.folder, wanted.documents))]
    small, model, head, out = (folder / part for part in ("small", "model", "eagle", "speculate"))
    optim = OptimConfig(lr=3e-3, min_lr=1e-4, warmup=50, decay=0.3)
    if not (small / "report.html").is_file():
        pretrain.main(pretrain.Settings(
            model=config, data=tuple(documents), out=small, steps=wanted.steps, rows=8, length=LENGTH, optim=optim,
            mtp_depths=2 if config.mtp else 0, save_every=200, prompts=(),
        ))  # fmt: skip
    learnt = str(asked(wanted.folder, wanted.learnt))
    if not (folder / "small_eagle" / "report.html").is_file():
        eagle.main(eagle.Settings(
            model=str(small), out=folder / "small_eagle", prompts=(f"{learnt}#prompt",), prompt_tokens=768, tokens=256,
            answers=480, measured=32, words=SIZES["vocab"], steps=400, rows=2, together=8,
        ))  # fmt: skip
    if not model.is_dir():
        trained, tokenizer = nautilus.load(small)
        wide = widened(trained, TIMES[name]).bfloat16()
        wide.save(model, tokenizer=tokenizer)
        load_eagle(folder / "small_eagle", trained).save(head, nautilus.load(model)[0])
    learned = {"answer": 256, "drafts": wanted.drafts}
    if not (folder / "small_hvd" / "traces.jsonl").is_file():
        own = None if config.mtp else folder / "small_eagle"
        hvd.main(hvd.Settings(model=str(small), eagle=own, prompts=(learnt,), out=folder / "small_hvd", **learned))
    if not (folder / "hvd" / "payoff.safetensors").is_file():
        own, traces = None if config.mtp else head, folder / "small_hvd" / "traces.jsonl"
        hvd.main(hvd.Settings(model=str(model), eagle=own, traces=traces, out=folder / "hvd", **learned))
    speculate.main(speculate.Settings(
        model=str(model), eagle=head, hvd=folder / "hvd", out=out, each=wanted.each, repeats=wanted.repeats,
        drafts=wanted.drafts, answer=384,
    ))  # fmt: skip
    return json.loads((Run(out).folder / "results.json").read_text())


def rows_of(name: str, found: dict) -> Iterator[dict]:
    """What was aimed at, for every arm of ours."""
    numbers = {(row["arm"], row["family"]): row for row in found["rows"]}
    families = [*dict.fromkeys(row["family"] for row in found["rows"])]
    for arm in [*dict.fromkeys(row["arm"] for row in found["rows"] if row["arm"].startswith("ours"))]:
        lows = {family: numbers[arm, family]["speed_up"]["low"] for family in families}
        beside = [pair for pair in found["pairs"] if pair["arm"] == arm and pair["other"] not in KNOW]
        best = {
            family: min((pair["mean"] for pair in beside if pair["family"] == family), default=math.nan)
            for family in families
        }
        yield {
            "target": name, "arm": arm, "plain, lower end": lows, "model": best,
            "plain": {family: numbers[arm, family]["speed_up"]["mean"] for family in families},
            "oracle": numbers[arm, families[-1]]["of_oracle"],
            "predictor": [one["predictor"]["all"] for one in found["drafts"] if one["arm"] == arm],
        }  # fmt: skip


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[*targets()], choices=[*targets(), []])
    parser.add_argument("--folder", type=Path, default=Path("runs/speculation"))
    parser.add_argument("--steps", type=int, default=2400, help="of training a model")
    parser.add_argument("--documents", type=int, default=40_000, help="that models are trained on")
    parser.add_argument(
        "--learnt", type=int, default=80, help="prompts of a family that predictors and heads learn from"
    )
    parser.add_argument("--each", type=int, default=20, help="prompts of a family that are evaluated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drafts", type=int, default=16, help="most tokens that are tried at once")
    parser.add_argument("--record", type=Path)
    wanted = parser.parse_args(words)
    rows = [row for name in wanted.targets for row in rows_of(name, carried_through(name, targets()[name], wanted))]
    for row in rows:
        lows = {family: round(value, 3) for family, value in row["plain, lower end"].items()}
        print(f"{row['target']}, {row['arm']}: plain {lows}, model {row['model']}, oracle {row['oracle']:.3f}")
    append(wanted.record, "speculation.py", words, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
