"""Environments of `verifiers` both ways. The library is not asked for: what stands in its place here has as much of its
API, as of versions 0.1.14 to 0.3, as the adapters use, with the rubric that such environments add to watch turns."""

import itertools
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import GraderBroken, Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS
from nautilus.tasks.verifiers import OfVerifiers, as_environment


class Rubric:
    def __init__(self, funcs=(), weights=()):
        self.funcs, self.weights = [*funcs], [*weights] or [1.0] * len(funcs)
        self.class_objects = {"parser": SimpleNamespace(parse_answer=lambda said: said[-1]["content"].strip())}


class RubricGroup(Rubric):
    def __init__(self, rubrics):
        super().__init__()
        self.rubrics = rubrics


async def num_turns(state):
    return len(state["trajectory"])


class SingleTurnEnv:
    max_turns = 1

    def __init__(self, dataset, rubric):
        self.dataset, self.source = None, dataset
        self.rubric = RubricGroup([rubric, Rubric([num_turns], [0.0])])

    def get_dataset(self):
        return self.source


class ToolEnv(SingleTurnEnv):
    max_turns = 10


ROWS = [{"question": "2+2", "answer": "4", "info": '{"by": 2}'}, {"prompt": [{"role": "user", "content": "5"}]}]


def right(completion, answer, parser) -> float:
    return float(parser.parse_answer(completion) == answer)


async def short(completion, info, **more) -> float:
    assert more["prompt"] and more["state"]["answer"] == more["answer"]
    return 1 / info["by"] if len(completion[0]["content"]) < 3 else 0.0


@pytest.fixture
def library(monkeypatch):
    module = ModuleType("verifiers")
    there = {
        "sums": SingleTurnEnv(ROWS[:1], Rubric([right, short], [1.0, 0.5])),
        "tools": ToolEnv(ROWS, Rubric([right])),
        "unjudged": SingleTurnEnv(ROWS, Rubric()),
        "empty": SingleTurnEnv([], Rubric([right])),
    }

    def load_environment(name):
        if name not in there:
            raise ValueError(f"Could not import '{name}' environment.")
        return there[name]

    vars(module).update(
        Rubric=Rubric, RubricGroup=RubricGroup, SingleTurnEnv=SingleTurnEnv, load_environment=load_environment
    )
    monkeypatch.setitem(sys.modules, "verifiers", module)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=SimpleNamespace(from_list=list)))


def first(task):
    return task.draw(random.Random(0), 1)


def test_an_environment_is_a_task_by_its_name(library):
    task = asked("verifiers@sums*2").task
    problem = first(task)
    assert task.name == problem.task == "verifiers@sums" and problem.messages == ({"role": "user", "content": "2+2"},)
    verdicts = [task.grade(problem, Reply(content=said)) for said in (" 4", "it is 4", "5")]
    assert [one.reward for one in verdicts] == [1.25, 0, 0.25]
    assert verdicts[0].parts == {"right": 1, "short": 0.5} and verdicts[0].why == "right 1.00, short 0.50"


def test_prompts_are_taken_as_they_are(library):
    assert first(OfVerifiers("own", SingleTurnEnv(ROWS[1:], Rubric([right])))).messages == tuple(ROWS[1]["prompt"])


@pytest.mark.parametrize("wrong", [lambda judge: 1.0, lambda completions: [1.0], lambda: [1.0], lambda answer: None])
def test_functions_that_fail_are_broken_graders(library, wrong):
    task = OfVerifiers("own", SingleTurnEnv(ROWS, Rubric([right, wrong])))
    with pytest.raises(GraderBroken, match="the reward function .* failed"):
        task.grade(first(task), Reply(content="4"))


@pytest.mark.parametrize(
    "name, why",
    [
        ("none", "Could not import 'none'"), ("tools", "has several turns"), ("unjudged", "2 rows and 0 judges"),
        ("empty", "0 rows and 1 judges"),
    ],
)  # fmt: skip
def test_environments_that_cannot_be_asked_are_refused(library, name, why):
    with pytest.raises(UserError, match=f"the task verifiers@{name} was asked for: .*{why}"):
        asked(f"verifiers@{name}")


@pytest.mark.parametrize("module", [None, ModuleType("verifiers")])
def test_without_the_library_or_with_a_later_one_it_says_which_is_needed(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "verifiers", module)
    with pytest.raises(UserError, match="verifiers@sums needs the library verifiers; pip install 'verifiers<0.4'"):
        asked("verifiers@sums")


def test_a_task_is_an_environment_and_is_one_of_ours_again(library):
    task = TASKS["sort"]()
    environment = as_environment(task, 5, seed=3)
    problems = [*itertools.islice(task.problems("train", seed=3), 5)]
    assert [row["prompt"] for row in environment.get_dataset()] == [[*one.messages] for one in problems]
    (reward,) = environment.rubric.rubrics[0].funcs
    answer = environment.get_dataset()[0]["answer"]
    assert [reward(said, answer) for said in (problems[0].truth, "z", [{"content": problems[0].truth}])] == [1, 0, 1]
    again = OfVerifiers("again", environment)
    problem = first(again)
    (same,) = [one for one in problems if one.messages == problem.messages]
    assert again.grade(problem, Reply(content=same.truth)).reward == 1
    assert again.grade(problem, Reply(content="z z z")).reward == 0
