"""Every recipe is a thin story, found by the command line, and runs for two steps on the toy preset."""

import dataclasses
import importlib
import inspect
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

import nautilus
from nautilus.cli import main
from nautilus.cli.command import COMMANDS
from nautilus.recipes.demo import beginning
from nautilus.runtime import Run, read_metrics
from nautilus.train.average import merge_coefficients
from nautilus.train.checkpoint import snapshots

FOLDER = pathlib.Path(nautilus.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
SMALL = "steps=2 rows=2 micro=1 length=48 save_every=1 optim.warmup=0 optim.decay=0.5 model.vocab=400 prompts=a"
PRACTICE = "prompts=2 problems=8 tokens=200 turn_tokens=6 steps=2 measured=4 optim.warmup=0"
# How each recipe is tried; {text} is a folder of text files, {out} a new folder, {model} what pretrain left.
PIPELINE = (
    "tasks=count supervised.steps=2 supervised.problems=40 "
    "supervised.rows=2 supervised.optim.warmup=0 specialist.steps=2 specialist.prompts=2 specialist.group=2 "
    "specialist.problems=8 specialist.measured=4 specialist.optim.warmup=0 student.steps=2 student.prompts=2 "
    "student.problems=8 student.measured=4 student.optim.warmup=0 drafts.answers=8 drafts.measured=3 drafts.steps=2 "
    "drafts.rows=2 drafts.prompt_tokens=48 drafts.tokens=12 drafts.drafts=3 measured=4 budgets="
)
TRIED = {
    "curate": "data={text} out={out} filters=repetition workers=1",
    "pretrain": f"toy data={{text}} out={{out}} {SMALL}",
    "demo": f"data={{text}} out={{out}} {SMALL} then.iterations=1 "
    + " ".join(f"then.{words}" for words in PIPELINE.split()),
    "compare": "study=decay variants=plateau seeds=1 jobs=1 out={out} base=data={text},length=48,rows=2,steps=4,"
    "optim.warmup=0,model.vocab=400",
    "eval": "{model} tasks=single lengths=600 samples=1 out={out}",
    "hvd": "{model} prompts={text} answer=24 drafts=4 max_tokens=160 out={out}",
    "boost": "{model} out={out} answers=8 measured=3 tokens=12 prompt_tokens=8 drafts=3 steps=2 rows=2",
    "eagle": "{model} out={out} answers=8 measured=3 tokens=12 prompt_tokens=8 drafts=3 steps=2 rows=2 words=90",
    "speculate": "{model} prompts={text} answer=24 drafts=4 max_tokens=160 each=2 repeats=1 out={out}",
    # A model that has learnt nothing writes what can be used only as rephrasings that may be anything.
    "synthesize": "{model} texts={text} kinds=rephrase rephrased.shortest=0 rephrased.longest=1e9 rephrased.facts=0 "
    "template=nemotron tokens=2000 turn_tokens=400 held_out=2 out={out}",
    "sft": "{model} tasks=count problems=40 length=200 steps=2 rows=2 optim.warmup=0 out={out}",
    "rlvr": f"{{model}} tasks=count {PRACTICE} group=2 out={{out}}",
    "dpo": f"{{model}} tasks=count {PRACTICE} group=8 out={{out}}",
    "mopd": f"{{model}} tasks=count teachers=count={{model}} {PRACTICE} out={{out}}",
    "posttrain": f"{{model}} out={{out}} baselines=true iterations=2 caught_up=0 {PIPELINE}",
    "chat": "{model} prompt=Hello sampling.max_tokens=4",
    "serve": "{model} port=0 max_tokens=64",
    "environments": "tasks=count port=0",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A little text, and a model that the pretrain recipe made of it."""
    here = tmp_path_factory.mktemp("recipes")
    (here / "text").mkdir()
    for number in range(20):
        counting = " ".join(f"{n} comes before {n + 1}." for n in range(number, number + 60))
        (here / "text" / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    assert run("pretrain", text=here / "text", out=here / "model") == 0
    return {"text": here / "text", "model": here / "model"}


def run(name: str, **places) -> int:
    return main([*command_of(name).split(), *TRIED[name].format_map(places).split()])


def command_of(name: str) -> str:
    """The command that a recipe is called by, of one word or two."""
    return next(words for words, command in COMMANDS.items() if command.module == f"nautilus.recipes.{name}")


def test_every_recipe_is_tried_here():
    assert set(TRIED) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_frozen_record_and_a_function(name):
    module = importlib.import_module(f"nautilus.recipes.{name}")
    settings = module.Settings()
    first = dataclasses.fields(settings)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, first, getattr(settings, first))
    assert all(field.kw_only for field in dataclasses.fields(settings))
    assert list(inspect.signature(module.main).parameters) == ["settings"]
    assert module.__doc__ and command_of(name).split()[0] == name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "pretrain"])
def test_a_training_recipe_leaves_a_whole_run(name, places, tmp_path, capsys):
    out = places["model"] if name == "pretrain" else tmp_path / "out"
    if name != "pretrain":
        assert run(name, text=places["text"], out=out) == 0
        shown = capsys.readouterr().out
        assert str(out / "report.html") in shown and f"nautilus chat {out}" in shown
    left = Run.open(out)
    assert [row["step"] for row in read_metrics(left.metrics)] == [0, 1]
    assert left.report.read_text().startswith("<!DOCTYPE html>") or "<html" in left.report.read_text()
    assert left.picture.read_bytes().startswith(b"\x89PNG")
    model, tokenizer = nautilus.load(out)
    assert model.config.vocab == 400 and tokenizer.encode("comes before")
    assert json.loads(left.config.read_text())["settings"]["steps"] == 2


def test_the_demo_prints_the_first_lines_of_a_completion():
    assert beginning("a\nb") == "a\nb" and beginning("\n".join("abcdefg")) == "\n".join("abcdefg")
    assert beginning("\n".join("abcdefgh")).splitlines() == [*"abcdefg", "…"]


@pytest.mark.slow
def test_a_comparison_leaves_a_report(places, tmp_path, capsys):
    assert run("compare", text=places["text"], out=tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "no interval" in shown and str(tmp_path / "out" / "report.html") in shown
    assert "plateau" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_an_evaluation_leaves_a_report(places, tmp_path, capsys):
    assert run("eval", model=places["model"], out=tmp_path / "out") == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out
    assert "single" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_post_training_leaves_every_stage_and_what_came_of_it(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("posttrain", model=places["model"], out=out) == 0
    assert str(out / "report.html") in capsys.readouterr().out and (out / "report.png").exists()
    found = json.loads((out / "results.json").read_text())
    baselines = {"mean of specialists", "their answers learnt", "all at once"}
    each = {name for number in (1, 2) for name in (f"count specialist {number}", f"student {number}")}
    assert set(found["scores"]) == {"sft", *each, *baselines}
    assert [row["task"] for row in found["gains"]] == ["count"] and "student 2" in found["gains"][0]
    loops = {f"{number}-{name}" for number in (1, 2) for name in ("count", "student")}
    stages = {"sft", *loops, "boost", "learnt", "all"}
    assert stages <= {row["stage"] for row in found["stages"]} and all((out / name).is_dir() for name in stages)


@pytest.mark.slow
def test_a_synthesis_leaves_rows_and_a_report(places, tmp_path, capsys):
    assert run("synthesize", text=places["text"], model=places["model"], out=tmp_path / "out") == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out
    assert (tmp_path / "out" / "conversations.jsonl").read_text() and (tmp_path / "out" / "report.png").exists()


@pytest.mark.slow
def test_the_final_weights_can_be_an_average_of_snapshots(places, tmp_path):
    words = TRIED["pretrain"].format(text=places["text"], out=tmp_path / "out").split()
    assert main(["pretrain", *words, "average=2", "average_every=1"]) == 0
    parts = [load_file(folder / "model.safetensors") for folder in snapshots(Run(tmp_path / "out"))]
    weights = nautilus.load(tmp_path / "out")[0].state_dict()
    first, second = merge_coefficients(2)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, first * parts[0][name] + second * parts[1][name])


@pytest.mark.slow
def test_the_same_command_again_goes_on_and_other_settings_are_refused(places, capsys):
    assert run("pretrain", text=places["text"], out=places["model"]) == 0
    assert f"resuming {places['model']} after step 2 of 2" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(places["model"] / "metrics.jsonl")] == [0, 1]
    words = TRIED["pretrain"].format(text=places["text"], out=places["model"]).split()
    assert main(["pretrain", *words, "seed=1"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.slow
def test_what_pretrain_leaves_can_be_talked_to(places, capsys):
    assert run("chat", **places) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "words, message",
    [
        ("rows=1e10 micro=0", "GB of memory"),
        ("rows=1e10 micro=1", "GB of memory"),
        ("length=1e9", "GB of memory"),
        ("model.vocab=1e11", "GB of memory"),
        ("mtp_depths=1e9", "do not lie in rows of length=48"),
        ("save_every=-1", "save_every=-1 must be at least 0 and below 1e+38"),
        ("balance=nan", "balance='nan' is not a finite number"),
        ("balance=1e300", "balance=1e+300 must be"),
        ("aux_weight=-1", "aux_weight=-1.0 must be"),
        ("mtp_weight=inf", "mtp_weight='inf' is not a finite number"),
        ("recipe=super steps=many", "steps='many' is not a whole number"),
        ("layout.pp=99", "pp=99 stages cannot share"),
    ],
)
def test_pretrain_refuses_what_cannot_be_before_anything_is_written(places, tmp_path, capsys, words, message):
    given = TRIED["pretrain"].format_map({**places, "out": tmp_path / "out"})
    assert main(["pretrain", *given.split(), *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()
