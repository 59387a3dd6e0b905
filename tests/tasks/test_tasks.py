"""Every procedural task: what its worked answers earn, what others earn, and that its problems do not change."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from nautilus.tasks import Call, GraderBroken, Problem, Reply, Task
from nautilus.tasks.named import TASKS
from nautilus.tasks.task import SPLITS, without_thinking

ALL = sorted(TASKS)


def reply_of(message) -> Reply:
    calls = tuple(
        Call(name=one["function"]["name"], arguments=one["function"]["arguments"])
        for one in message.get("tool_calls", ())
    )
    return Reply(content=message["content"], thinking=message.get("reasoning_content"), calls=calls)


def walked(task: Task, problem: Problem):
    """The episode of the worked course, in which the tools must answer as it says."""
    episode = task.episode(problem)
    course = [*problem.worked]
    while course:
        told = [*episode.hear(reply_of(course.pop(0)))]
        wanted = [*itertools.takewhile(lambda one: one["role"] == "tool", course)]
        assert told == wanted, (problem, told)
        del course[: len(wanted)]
    assert not told, "a worked course ends the episode"
    return episode


def some(name: str, count: int = 30) -> list[Problem]:
    return [*itertools.islice(TASKS[name]().problems("train", seed=1), count)]


@pytest.mark.parametrize("name", ALL)
def test_worked_answers_are_right(name):
    for problem in some(name):
        verdict = walked(TASKS[name](), problem).verdict()
        assert 0 <= verdict.reward <= 1
        assert verdict.reward == (0.25 if name == "style" else 1), (problem, verdict)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("said", ["", "nonsense", "[IDK]", "{}", "\\boxed{E}", "0" * 400, "🦑 \x00"])
def test_other_answers_are_wrong_and_break_nothing(name, said):
    for problem in some(name, 10):
        episode = TASKS[name]().episode(problem)
        assert not episode.hear(Reply(content=said))
        reward = episode.verdict().reward
        assert reward == 0 or (name, said) == ("abstain", "[IDK]")


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_draws_the_same_problems_of_every_level_and_splits_are_apart(name):
    task = TASKS[name]()
    of = {split: [*itertools.islice(task.problems(split, seed=3), 40)] for split in SPLITS}
    assert of["train"] == [*itertools.islice(TASKS[name]().problems("train", seed=3), 40)]
    assert {problem.level for problem in of["train"]} == set(task.levels)
    ids = {split: {problem.id for problem in problems} for split, problems in of.items()}
    assert not any(ids[one] & ids[other] for one, other in itertools.combinations(SPLITS, 2))
    for split, problems in of.items():
        assert all(problem.split == split and problem.task == name for problem in problems)
    assert of["train"] != [*itertools.islice(task.problems("train", seed=4), 40)]


@pytest.mark.parametrize("name", ALL)
def test_problems_are_plain_data(name):
    for problem in some(name, 5):
        again = json.loads(json.dumps(vars(problem)))
        assert again["truth"] == json.loads(json.dumps(problem.truth))
        fields = {key: tuple(again[key]) for key in ("messages", "worked", "tools")}
        same = replace(problem, **fields, truth=again["truth"])
        assert same.id == problem.id and walked(TASKS[name](), same).verdict().reward > 0


def test_questions_of_what_is_not_there_are_refused():
    task = TASKS["sort"]()
    with pytest.raises(ValueError, match="split 'half'"):
        next(task.problems("half"))
    with pytest.raises(ValueError, match="level 9.*levels 1 to 8"):
        next(task.problems("train", level=9))
    with pytest.raises(GraderBroken, match="before the model said anything"):
        task.episode(some("sort", 1)[0]).verdict()


def test_answers_without_thinking():
    problem = some("arithmetic", 1)[0]
    assert problem.worked[0]["reasoning_content"]
    assert "reasoning_content" not in without_thinking(problem).worked[0]


# ----- one by one -----------------------------------------------------------------------------------------------------


def test_arithmetic_carries():
    from nautilus.tasks.arithmetic import digit_by_digit, number_is

    assert digit_by_digit(47, 85, "+") == "7+5=12 2 1; 4+8+1=13 3 1"
    assert digit_by_digit(52, 7, "-") == "2-7=-5 5 1; 5-0-1=4 4 0"
    assert number_is("It is 1,234.", "1234").reward == 1 == number_is("first 5, then 12", "12").reward
    assert number_is("123456789012345678901", "123456789012345678900").reward == 0
    with pytest.raises(GraderBroken):
        number_is("3", "three")


@pytest.mark.parametrize("expression, value", [("2 + 3 * 4", 14), ("-(7 - 9) * 3", 6), ("1", 1), ("  12-5 ", 7)])
def test_the_calculator_calculates(expression, value):
    from nautilus.tasks.arithmetic import calculate

    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "a + 1",
        "__import__('os')",
        "2 ** 9",
        "9" * 300,
        "(" * 150,
        "True + 1",
        "1.5 + 1",
        "10" * 40 + "*" + "10" * 40,
    ],
)
def test_and_nothing_else(expression):
    from nautilus.tasks.arithmetic import calculate

    with pytest.raises(ValueError):
        calculate(expression)


def test_a_derivative_is_right_however_it_is_written_and_the_question_is_none():
    from nautilus.tasks.arithmetic import polynomial

    pytest.importorskip("math_verify")
    task = TASKS["derivative"]()
    assert polynomial([(-3, 2), (5, 1), (-2, 0)]) == "-3x^2 + 5x - 2"
    problem = replace(some("derivative", 1)[0], truth="6x^2 - 4")
    grade = lambda said: task.grade(problem, Reply(content=said)).reward
    assert [grade(said) for said in ("6x^2-4", "2(3x^2 - 2)", "-4 + 6*x*x", "12x^2/2 - 8/2")] == [1] * 4
    wrong = "2x^3 - 4x", "6x^2 + 4", "6x - 4", "d/dx(2x^3 - 4x)", "\\frac{d}{dx}(2x^3 - 4x)", "it is 6x^2 - 4", "("
    assert [grade(said) for said in wrong] == [0] * len(wrong)


@pytest.mark.parametrize(
    "expressions, reward",
    [([], 0), (["2 ** 9"], 0), (["a"], 0), (["1 + 1"], 1), (["2 ** 9", "7 * 8"], 1)],
)
def test_a_right_number_earns_nothing_where_no_call_gave_a_value(expressions, reward):
    problem = some("calculator", 1)[0]
    episode = TASKS["calculator"]().episode(problem)
    episode.hear(Reply(fault="a call that cannot be read"))
    for expression in expressions:
        episode.hear(Reply(calls=(Call(name="calculate", arguments={"expression": expression}),)))
    assert not episode.hear(Reply(content=problem.truth))
    assert episode.verdict().reward == reward
    assert reward or episode.verdict().why == "no call gave a value"


def test_faults_and_calls_of_agents_are_told_and_go_on():
    problem = some("store", 1)[0]
    episode = TASKS["store"]().episode(problem)
    assert "error: a call that cannot be read" in episode.hear(Reply(fault="a call that cannot be read"))[0]["content"]
    for call, words in (
        (Call(name="burn", arguments={}), "no tool 'burn'"),
        (Call(name="get", arguments={}), "get takes key"),
        (Call(name="get", arguments={"key": "nowhere"}), "no key 'nowhere'"),
        (Call(name="put", arguments={"key": "a", "value": "1", "more": 2}), "put takes key, value"),
        (Call(name="remove", arguments={"key": ["a", {}]}), "no key"),
    ):
        (told,) = episode.hear(Reply(calls=(call,)))
        assert told["role"] == "tool" and words in told["content"]
    assert episode.verdict().parts == {"calls": 5, "faults": 1}
    assert episode.verdict().reward == 0


def test_a_program_is_mended_by_whatever_does_it_and_judged_by_hidden_runs():
    problem = next(TASKS["repair"]().problems("train", level=2))
    episode = TASKS["repair"]().episode(problem)
    call = lambda name, **arguments: episode.hear(Reply(calls=(Call(name=name, arguments=arguments),)))[0]["content"]
    assert call("run", input=3) == told_by(problem.truth["program"], 3)
    assert "lines 1 to 4" in call("edit", line=9, instruction="neg")
    assert "is no instruction" in call("edit", line=1, instruction="jump 3")
    assert "error" in call("run", input="x")
    assert episode.verdict().reward == 0
    for number in range(4):
        call("edit", line=number + 1, instruction="push 999999999999")
    assert call("run", input=3) == "999999999999" and episode.verdict().parts["runs"] == 0
    call("edit", line=1, instruction="mul")
    assert "'mul' takes 2 numbers, and the stack has 1" in call("run", input=3)
    assert episode.verdict().reward == 0


def told_by(program, value) -> str:
    from nautilus.tasks.machine import run

    try:
        return str(run(program, value))
    except ValueError as bad:
        return f"error: {bad}"


@pytest.mark.parametrize(
    "program, value, given",
    [
        ([], 7, 7), (["push 3"], 7, 3), (["push 3", "sub"], 7, 4), (["push 3", "swap", "sub"], 7, -4),
        (["dup", "mul", "push -2", "add"], -3, 7), (["push 5", "max", "neg"], 2, -5), (["push 2", "swap"], 7, 7),
        (["dup", "push 1", "add", "mul"], 4, 20),
    ],
)  # fmt: skip
def test_the_machine_has_a_stack(program, value, given):
    from nautilus.tasks.machine import run

    assert run(program, value) == given


@pytest.mark.parametrize(
    "program, why",
    [
        (["add"], "'add' takes 2 numbers, and the stack has 1"), (["push 1", "add", "swap"], "'swap' takes 2 numbers"),
        (["add 3"], "'add 3' is no instruction; write push N, add"), (["push"], "is no instruction"),
        (["push --3"], "is no instruction"), (["dup", "mul"] * 7, "the number is beyond"),
    ],
)  # fmt: skip
def test_and_what_it_cannot_do_ends_the_run(program, why):
    from nautilus.tasks.machine import gives, run

    with pytest.raises(ValueError, match=why):
        run(program, 9)
    assert gives(program, 9) is None


def test_programs_to_mend_use_what_they_are_given_and_differ_where_it_is_shown_and_where_it_is_not():
    from nautilus.tasks.machine import LARGE, SMALL, broken, gives

    rng, failing = random.Random(0), 0
    for lines in [3, 4, 5, 6] * 5:
        right, wrong, at = broken(rng, lines)
        assert [*right[:at], *right[at + 1 :]] == [*wrong[:at], *wrong[at + 1 :]] and len(right) == lines
        told = [[gives(one, value) for value in (*SMALL, *LARGE)] for one in (right, wrong)]
        assert None not in told[0] and len({*told[0][: len(SMALL)]}) > 1
        assert all(told[0][part] != told[1][part] for part in (slice(len(SMALL)), slice(len(SMALL), None)))
        failing += None in told[1]
    assert 0 < failing < 20  # some give something else, and some find too few numbers


def test_json_earns_by_its_schema_and_tells_of_its_facts():
    problem = next(TASKS["fields"]().problems("train", level=3))
    facts, task = problem.truth["facts"], TASKS["fields"]()
    invented = {key: {str: "Nobody", int: 1, bool: not value}[type(value)] for key, value in facts.items()}
    grade = lambda said: task.grade(problem, Reply(content=said))
    assert grade(json.dumps(invented)).reward == 1 and grade(json.dumps(invented)).parts["facts"] < 1
    assert grade(json.dumps(facts)).parts == {"facts": 1.0}
    assert grade(json.dumps({**facts, "more": 1})).reward == 0
    assert grade(json.dumps({key: [value] for key, value in facts.items()})).reward == 0
    assert grade("[" * 100_000).reward == 0


def test_what_must_not_be_said_is_not_made_up_for():
    problem = next(TASKS["forbidden"]().problems("train", level=3))
    secret, words = problem.truth["secret"], problem.truth["words"]
    grade = lambda *said: TASKS["forbidden"]().grade(problem, Reply(content=" ".join(said))).reward
    assert grade(*words) == 1 and grade(*words, secret.upper()) == 0 and grade(words[0]) == pytest.approx(1 / 3)


def test_who_does_not_know_says_so():
    tasks = TASKS["abstain"]()
    there, gone = (
        next(one for one in tasks.problems("train", level=2) if (one.truth == "[IDK]") is unknown)
        for unknown in (False, True)
    )
    grade = lambda problem, said: tasks.grade(problem, Reply(content=said))
    assert [grade(there, said).reward for said in (there.truth, "[IDK]", "1")] == [1, 0.5, 0]
    assert [grade(gone, said).reward for said in ("[IDK]", "11")] == [1, 0]
    assert grade(gone, "11").parts["invented"] == 1
    with pytest.raises(ValueError, match="unsure=2"):
        type(tasks)(unsure=2)


def test_a_task_without_problems_of_a_split_says_so():
    class One(type(TASKS["sort"]())):
        def draw(self, rng: random.Random, level: int) -> Problem:
            return super().draw(random.Random(1), 1)

    one = One()
    split = one.draw(random.Random(), 1).split
    other = next(name for name in SPLITS if name != split)
    with pytest.raises(ValueError, match=f"no problem of the split '{other}'"):
        next(one.problems(other))
