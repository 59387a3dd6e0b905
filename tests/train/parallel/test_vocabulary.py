"""Embedding and head cut by word over tp: the curve of one process, what the plan says, states of any layout."""

import importlib.util
import json
import pathlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nautilus.config import Mamba
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.train.layout import Layout, Work
from nautilus.train.objective import pretrain
from nautilus.train.plan import Plan

FILE = pathlib.Path(__file__).parents[1] / "ranks.py"
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)
assert_same_curve = helper.assert_same_curve


def config_of_the_work(*, tied: bool = False):
    """The model of `ranks.work`."""
    config = shrink(preset("toy"), layers=4, width=32)
    wide = lambda layer: replace(layer, heads=8, groups=4) if isinstance(layer, Mamba) else layer
    return replace(config, layers=tuple(map(wide, config.layers)), vocab=96, tied=tied)


def test_two_processes_with_half_the_words_each_train_as_one_and_hold_what_the_plan_says(tmp_path, alone):
    got = helper.together(tmp_path, 2, layout={"tp": 2}, steps=3)
    assert_same_curve(got, alone(steps=3))
    held = [json.loads((tmp_path / f"held_{rank}.json").read_text()) for rank in range(2)]
    work = Work(rows=4, length=24, micro=2, compute=4)
    assert [4 * count for count in held] == [planned(Layout(tp=2), work)] * 2


def planned(layout: Layout, work: Work, *, tied: bool = False) -> int:
    return Plan(config=config_of_the_work(tied=tied), layout=layout, work=work).memory["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2}, {"dp": 2, "tp": 2, "ep": 4}, {"tp": 2, "cp": 2}], ids=str)
def test_a_head_that_is_the_embedding_is_cut_with_it(tmp_path, alone, layout):
    settings = {"steps": 20, "tied": True, "documents": True, "micro": 1 if "dp" in layout else 2}
    size = Layout(**layout).size
    got = helper.together(tmp_path, size, layout=layout, **settings)
    assert_same_curve(got, alone(**settings))
    work = Work(rows=4, length=24, micro=1, compute=4)
    held = [json.loads((tmp_path / f"held_{rank}.json").read_text()) for rank in range(size)]
    assert [4 * count for count in held] == [planned(Layout(**layout), work, tied=True)] * size


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_state_with_words_in_pieces_is_read_in_any_other_layout(tmp_path, alone, tied):
    layouts = [{"tp": 2}, {}, {"tp": 2, "dp": 2}, {"dp": 2}, {"tp": 2}]
    state = tmp_path / "run"
    state.mkdir()
    (state / "config.json").write_text('{"nautilus_run": 1, "settings": {}}')
    got = []
    for number, layout in enumerate(layouts):
        settings = {"steps": 2 * (number + 1), "state": str(state), "tied": tied}
        got += helper.together(tmp_path / str(number), Layout(**layout).size, layout=layout, **settings)
    assert_same_curve(got, alone(steps=10, tied=tied))


# ----- in one process, as one of one ---------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone: what travels comes back."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_vocabulary_that_does_not_divide_says_how_far_to_raise_it():
    class Two:
        def __getitem__(self, axis):
            return self

        def size(self):
            return 2

        def get_group(self):
            return None

    from nautilus.train.parallel.vocabulary import deal_words

    model = Language(replace(config_of_the_work(), vocab=97), device="meta")
    with pytest.raises(UserError, match=r"layout.tp=2 does not divide vocab=97; .* model.vocab to 98"):
        deal_words(model, Two())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_loss_logits_and_gradients_of_dealt_words_are_the_models_own(group, random_rows):
    from nautilus.train.parallel.mesh import meshes
    from nautilus.train.parallel.vocabulary import deal_words

    whole, dealt = (Language(config_of_the_work()).initialise(1) for _ in range(2))
    cuts = deal_words(dealt, meshes(Layout()).dense)
    assert sorted(cuts) == ["backbone.embeddings.weight", "lm_head.weight"]
    objective, found = pretrain(mtp_depths=2), []
    for model in (whole, dealt):
        batch = objective.weigh(random_rows(2, 24, vocab=96))
        terms, _ = objective.terms(model, batch)
        logits_BTV, _ = model(batch.tokens)
        (sum(total for total, _ in terms.values()) + logits_BTV.square().mean()).backward()
        found.append((logits_BTV, model.get_parameter("lm_head.weight").grad, model.backbone.embeddings.weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("depths", [0, 2])
def test_what_dealt_words_add_up_over_ranks_is_what_the_plan_counts(group, random_rows, monkeypatch, depths):
    from nautilus.train.parallel.mesh import meshes
    from nautilus.train.parallel.vocabulary import deal_words

    model, objective, sent, reduce = (
        Language(config_of_the_work()).initialise(1),
        pretrain(mtp_depths=depths),
        [],
        dist.all_reduce,
    )
    deal_words(model, meshes(Layout()).dense)
    monkeypatch.setattr(
        dist,
        "all_reduce",
        lambda tensor, *given, **named: (sent.append(tensor.nbytes), reduce(tensor, *given, **named)),
    )
    batch = random_rows(2, 400, vocab=96)
    batch.weights["next_token"][:, 1:] = 1
    terms, _ = objective.terms(model, objective.weigh(batch))
    sum(total for total, _ in terms.values()).backward()
    work = Work(rows=2, length=400, micro=2, compute=4, mtp_depths=depths)
    planned = Plan(config=config_of_the_work(), work=work).words_sent(0)
    assert sum(sent) / 800 == pytest.approx(planned, rel=0.01)
