"""A pipeline trains as one process does, alone and together with every other way to share a model out."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import nautilus
from nautilus.config import Nothing
from nautilus.model.language import Language
from nautilus.model.weights import load_model
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError, read_metrics
from nautilus.train.layout import Layout, Work
from nautilus.train.parallel import start
from nautilus.train.parallel.pipeline import Pipe, leave_stage, turns

FILE = pathlib.Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)
assert_same_curve = helper.assert_same_curve


@pytest.fixture(scope="module")
def alone(written_alone):
    """A function that gives the curve of a single process, and where it wrote."""
    return lambda **settings: (helper.curve_of(folder := written_alone(**settings)), folder)


def test_two_stages_train_as_one_process(tmp_path, alone):
    settings = {"steps": 3, "micro": 1, "health": 2, "documents": True}
    got = helper.together(tmp_path, 2, layout={"pp": 2}, **settings)
    assert_same_curve(got, alone(**settings)[0])
    digests = [(tmp_path / f"embedding_{rank}.txt").read_text() for rank in range(2)]
    assert digests[0] == digests[1], "the embedding and its copy in the last stage drift apart"


LAYOUTS = [
    ({"pp": 2}, {"micro": 1, "layers": 8}),
    ({"pp": 2}, {"depths": 0}),
    ({"pp": 2}, {"tied": True, "depths": 0, "micro": 1}),
    ({"pp": 2}, {"tied": True, "micro": 4}),
    ({"pp": 4}, {"micro": 1, "layers": 8, "health": 4, "documents": True}),
    ({"pp": 2, "dp": 2}, {"micro": 1, "documents": True}),
    ({"pp": 2, "dp": 2, "replicas": 2}, {"micro": 1}),
    ({"pp": 2, "dp": 2, "ep": 2}, {"micro": 1, "layers": 8, "documents": True}),
    ({"pp": 2, "tp": 2, "ep": 2}, {"micro": 1, "health": 4, "documents": True}),
    ({"pp": 2, "cp": 2}, {"micro": 1, "health": 4, "documents": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "settings"), LAYOUTS, ids=lambda value: "-".join(map(str, value)))
def test_a_pipeline_in_every_layout_gives_the_curve_and_the_model_of_one_process(tmp_path, alone, layout, settings):
    settings = {"steps": 20, "save": True} | settings
    got = helper.together(tmp_path, Layout(**layout).size, layout=layout, **settings)
    want, folder = alone(**settings)
    assert_same_curve(got, want)
    models = [load_model(where / "model").state_dict() for where in (tmp_path, folder)]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        torch.testing.assert_close(
            tensor, models[1][name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
def test_bf16_activations_pass_from_stage_to_stage(tmp_path, alone):
    settings = {"compute": "bfloat16", "steps": 1}
    assert_same_curve(helper.together(tmp_path, 2, layout={"pp": 2}, **settings), alone(**settings)[0], rel=2**-8)


@pytest.mark.slow
def test_a_state_of_a_pipeline_is_resumed_in_any_other_layout_and_back(tmp_path, alone):
    layouts = [{"pp": 2}, {"dp": 2, "ep": 2}, {"pp": 2, "tp": 2}, {}, {"pp": 4}, {"pp": 2, "cp": 2}, {}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"nautilus_run": 1, "settings": {}}')
    got = []
    for number, layout in enumerate(layouts):
        steps, state = 3 * (number + 1), str(tmp_path / "run")
        got += helper.together(tmp_path / str(number), Layout(**layout).size, layout=layout, steps=steps, state=state)
    assert_same_curve(got, alone(steps=3 * len(layouts))[0])


@pytest.mark.slow
def test_micro_batches_of_several_lengths_pass_in_one_step(tmp_path):
    """By the command, and another layout goes on with the run."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        counting = " ".join(f"{n} comes before {n + 1}." for n in range(number, number + 60))
        (tmp_path / "text" / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    small = "rows=4 micro=1 lengths=1*48,1*24 mixing=together length=48 optim.warmup=0 model.vocab=400 prompts=a"
    run = [sys.executable, "-m", "nautilus", "pretrain", "toy", f"data={tmp_path}/text", f"out={tmp_path}/run"]

    def call(*words: str) -> subprocess.CompletedProcess:
        command, environment = [*run, *small.split(), "compute=fp32", *words], os.environ | helper.ALIKE
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * helper.PATIENCE)

    wrong = call("steps=2", "layout.pp=99")
    assert wrong.returncode == 2 and "this layout cannot be: pp=99 stages cannot share" in wrong.stderr
    for words in (["steps=2", "layout.pp=2"], ["steps=4"]):
        done = call(*words)
        assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(4))
    assert nautilus.load(tmp_path / "run")[0].config.vocab == 400


def test_at_most_one_micro_batch_more_than_later_stages_is_under_way():
    for count in range(1, 9):
        for ahead in range(4):
            order, under_way, most = [*turns(count, ahead)], 0, 0
            for turn in order:
                under_way += 1 if turn == "forward" else -1
                assert under_way >= 0
                most = max(most, under_way)
            assert order.count("forward") == order.count("backward") == count and most == min(count, ahead + 1)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_have_every_tensor_once_but_for_the_copied_embedding(tied):
    config = shrink(preset("toy"), layers=6)
    config = type(config)(**(vars(config) | {"tied": tied, "layers": (*config.layers, Nothing())}))
    whole = Language(config).state_dict()
    for depths in (0, 2):
        parts = []
        for stage in range(3):
            model = Language(config)
            pipe = Pipe(stage=stage, line=[0, 1, 2], onward=None, back=None, ends=None)
            leave_stage(model, pipe, Work(length=24, mtp_depths=depths))
            assert pipe.shares_embedding == ((tied or depths > 0) and stage != 1)
            assert model.ends == (stage == 2)
            parts.append(model.state_dict())
        assert {name for part in parts for name in part} == whole.keys()
        twice = {name for name in whole if sum(name in part for part in parts) > 1}
        assert twice == ({"backbone.embeddings.weight"} if tied or depths else set())
        assert twice <= parts[0].keys() & parts[2].keys()


@pytest.mark.parametrize(
    ("layout", "work", "message"),
    [
        ({"pp": 9}, {}, r"pp=9 stages cannot share \d layers"),
        ({"pp": 2, "dp": 3}, {"rows": 4}, "rows=4 is no multiple of dp=3"),
        ({"pp": 2, "tp": 4}, {}, "tp=4 does not divide"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_before_a_process_is_started(monkeypatch, layout, work, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.execv", lambda *words: pytest.fail("processes were started"))
    with pytest.raises(UserError, match=message):
        start(Layout(**layout), shrink(preset("toy"), layers=4), Work(**work))
