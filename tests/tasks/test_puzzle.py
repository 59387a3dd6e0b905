"""Data sets of `reasoning-gym` as tasks of ours, and ours as data sets of theirs, used as the library uses them."""

import json
import sys

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import GraderBroken, Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS
from nautilus.tasks.puzzle import Puzzle, gym, offered


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("reasoning_gym")
    return gym()


@pytest.fixture
def register(library, monkeypatch):
    """Of the library's data sets, as it was before when a test is over."""
    monkeypatch.setattr(library.factory, "DATASETS", dict(library.factory.DATASETS))
    return library.factory.DATASETS


def test_a_data_set_of_theirs_is_a_task(library):
    task = asked("rg/leg_counting").task
    problems = [next(task.problems("train", seed=seed)) for seed in (1, 1, 2)]
    assert problems[0] == problems[1] != problems[2] and problems[0].task == "rg/leg_counting"
    for problem in problems:
        assert problem.messages == ({"role": "user", "content": problem.truth["question"]},)
        said = [f" {problem.truth['answer']}\n", str(int(problem.truth["answer"]) + 1), ""]
        rewards = [task.grade(problem, Reply(content=one)).reward for one in said]
        assert rewards[0] == 1 and max(rewards[1:]) < 0.1


def test_its_settings_are_its_own_and_its_scores_are_held_to_what_rewards_are(library, monkeypatch):
    task = Puzzle("leg_counting", min_animals=1, max_animals=1)
    problem = next(task.problems("train"))
    assert problem.truth["metadata"]["num_animals"] == 1
    for score, reward in ((1.5, 1), (-1, 0)):
        monkeypatch.setattr(task.judge, "score_answer", lambda answer, entry, score=score: score, raising=False)
        assert task.grade(problem, Reply(content="4")).reward == reward
    monkeypatch.setattr(task.judge, "score_answer", lambda answer, entry: entry["nothing"], raising=False)
    with pytest.raises(GraderBroken, match="rg/leg_counting could not score an answer: KeyError"):
        task.grade(problem, Reply(content="4"))


def test_names_that_it_does_not_have_and_a_library_that_is_missing_are_told(library, monkeypatch):
    with pytest.raises(UserError, match="the task rg/walking was asked for: Dataset 'walking' not registered"):
        asked("rg/walking")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="rg/leg_counting needs the library reasoning-gym"):
        asked("rg/leg_counting")


# ----- the other way --------------------------------------------------------------------------------------------------

SINGLE = [name for name, make in TASKS.items() if make().turns == 1]


@pytest.mark.parametrize("name", SINGLE)
def test_a_task_is_a_data_set_of_theirs(library, register, name):
    assert offered(TASKS[name]()) == f"nautilus/{name}"
    data = library.create_dataset(f"nautilus/{name}", size=4, seed=3)
    assert len(data) == 4 == len(entries := [*data]) and isinstance(data, library.dataset.ProceduralDataset)
    assert entries == [*library.create_dataset(f"nautilus/{name}", size=4, seed=3)]
    assert entries != [*library.create_dataset(f"nautilus/{name}", size=4, seed=4)]
    score = library.get_score_answer_fn(f"nautilus/{name}")
    for at, entry in enumerate(json.loads(json.dumps(entries))):
        assert entry["question"] and entry["metadata"]["source_index"] == at
        assert score(entry["answer"], entry) == (0.25 if name == "style" else 1)
        assert score("nonsense", entry) == score(None, entry) == 0


def test_levels_and_splits_of_a_data_set_are_those_of_the_task(library, register):
    name = offered(task := TASKS["sort"]())
    data = library.create_dataset(name, size=6, seed=1, levels=[2, 5], split="test")
    assert [entry["metadata"]["difficulty"] for entry in data] == [{"level": 2}, {"level": 5}] * 3
    questions = {problem.messages[0]["content"] for problem, _ in zip(task.problems("train"), range(500), strict=False)}
    assert not questions & {entry["question"] for entry in data}
    with pytest.raises(ValueError, match="sort of level 9 was asked for"):
        library.create_dataset(name, seed=1, levels=[9])[0]
    with pytest.raises(ValueError, match="already registered"):
        offered(task)


def test_all_that_is_said_first_is_in_the_question(library, register):
    entry = library.create_dataset(offered(TASKS["forbidden"]()), seed=1)[0]
    before, asked_for = entry["question"].split("\n\n")
    assert before.startswith("Never say ") and asked_for.startswith("Name these words: ")


def test_it_is_mixed_seeded_anew_and_taken_back_as_theirs_are(library, register):
    from reasoning_gym.composite import CompositeConfig, CompositeDataset, DatasetSpec

    name = offered(TASKS["reverse"]())
    specs = [DatasetSpec(name=one, weight=1, config={}) for one in (name, "leg_counting")]
    mixed = CompositeDataset(CompositeConfig(size=20, seed=1, datasets=specs))
    sources = {entry["metadata"]["source_dataset"] for entry in mixed}
    assert sources == {name, "leg_counting"}
    assert all(mixed.score_answer(entry["answer"], entry) == 1 for entry in mixed)
    endless = library.dataset.ReseedingDataset(library.create_dataset(name, size=3, seed=1), chunk_size=3)
    seen = [next(endless)["question"] for _ in range(6)]
    assert seen[:3] == [entry["question"] for entry in library.create_dataset(name, size=3, seed=1)] != seen[3:]
    task = asked(f"rg/{name}").task
    problem = next(task.problems("train"))
    assert task.grade(problem, Reply(content=problem.truth["answer"])).reward == 1
