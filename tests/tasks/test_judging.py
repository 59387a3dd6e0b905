"""The task of a reward model: what it is asked, what it earns, and that either answer may come first."""

import asyncio
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.posttrain import compared
from nautilus.runtime import UserError
from nautilus.serve.request import Completion
from nautilus.tasks import GraderBroken, Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.judge import UNREADABLE, Judgement, asked_to_judge, judgement_of
from nautilus.tasks.judging import Judge, lesson
from nautilus.tasks.task import user

SCORES, RANKS = st.integers(1, 5), st.integers(1, 6)
JUDGEMENTS = st.builds(Judgement, score_1=SCORES, score_2=SCORES, ranking=RANKS)
ROW = {
    "messages": [{"role": "user", "content": "Name a colour."}], "response_1": "Red.", "response_2": "No.",
    "score_1": 5, "score_2": 1, "ranking": 1,
}  # fmt: skip


def some(task, count=200):
    return [*itertools.islice(task.problems("train", seed=2), count)]


@given(JUDGEMENTS, JUDGEMENTS)
def test_what_is_earned_is_the_formula(said, right):
    found = lesson(judgement_of(said.text), right)
    raw = -abs(said.score_1 - right.score_1) - abs(said.score_2 - right.score_2) - abs(said.ranking - right.ranking)
    assert found.parts["raw"] == raw and found.parts["readable"] == 1
    assert found.reward == max(0, 1 + raw / 10)
    assert raw == -sum(value for key, value in found.parts.items() if key.startswith("off_"))


@given(JUDGEMENTS, st.sampled_from(["", "{}", "4 2 2", '{"score_1": 9, "score_2": 1, "ranking": 1}']))
def test_what_cannot_be_read_costs_ten(right, text):
    assert judgement_of(text) == UNREADABLE
    assert lesson(judgement_of(text), right).parts == {"readable": 0, "raw": -10}
    assert lesson(judgement_of(text), right).reward == 0


@given(JUDGEMENTS, JUDGEMENTS, JUDGEMENTS)
def test_the_reward_never_falls_where_the_formula_rises(one, other, right):
    a, b = lesson(one, right), lesson(other, right)
    assert (a.parts["raw"] >= b.parts["raw"]) <= (a.reward >= b.reward)


@given(JUDGEMENTS)
def test_swapped_answers_swap_scores_and_mirror_the_ranking(one):
    other = one.swapped
    assert (other.score_1, other.score_2, other.ranking) == (one.score_2, one.score_1, 7 - one.ranking)
    assert other.swapped == one and judgement_of(other.text) == other


def answers_of(problem):
    _, _, rest = problem.messages[0]["content"].partition("\n\nanswer 1: ")
    return tuple(rest.split("\n\nanswer 2: "))


def test_the_oracle_says_of_swapped_answers_what_it_must():
    """Of every pair that is drawn, in the order that was not."""
    task = Judge()
    for seed in range(200):
        style = task.style.draw(random.Random(seed), 1 + seed % 3)
        for problem in some(task, 1):
            first, second = answers_of(problem)
            assert first != second
        texts = [", ".join(style.truth), "\n".join(f"- {word}" for word in style.truth) + "!" * (seed % 2)]
        one, other = (
            task.style.compare(style, *(Reply(content=text) for text in order)) for order in (texts, texts[::-1])
        )
        assert one.swapped == other


def test_worked_answers_earn_all_and_the_better_one_comes_first_as_often_as_not():
    task = Judge()
    problems = some(task)
    assert {problem.level for problem in problems} == {1, 2, 3}
    for problem in problems:
        worked = problem.worked[0]
        assert task.grade(problem, Reply(content=worked["content"])).reward == 1
        right = judgement_of(worked["content"])
        assert (right.score_1, right.score_2, right.ranking) == tuple(problem.truth.values())
        assert worked["reasoning_content"].count("so ") == 2
    ranks = [problem.truth["ranking"] for problem in problems]
    assert 0.4 < sum(rank <= 3 for rank in ranks) / len(ranks) < 0.6 and set(ranks) >= {2, 3, 4, 5}


def test_rows_of_people_are_asked_in_both_orders(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**ROW, "response_2": f"No {n}."}) + "\n" for n in range(30)))
    one = asked(f"judge@{path}*0.5")
    assert one.task.name == "judge" and one.share == 0.5 and not one.task.thinks
    seen = set()
    for problem in some(one.task, 60):
        first, second = answers_of(problem)
        swapped = second == "Red."
        seen.add(swapped)
        assert tuple(problem.truth.values()) == ((1, 5, 6) if swapped else (5, 1, 1))
        assert problem.messages == asked_to_judge(ROW["messages"], first, second)
        assert one.task.grade(problem, Reply(content=problem.worked[0]["content"])).reward == 1
    assert seen == {True, False}


def test_a_row_that_says_nothing_costs_its_own_answers(tmp_path):
    rows = [{key: value for key, value in ROW.items() if key != "ranking"}, {**ROW, "score_1": "good"}]
    rows += [{**ROW, "ranking": 99}, {**ROW, "score_2": 0}, {**ROW, "score_1": float("nan")}, {**ROW, "score_1": True}]
    for row in rows:
        task = Judge([row])
        problem = task.draw(random.Random(0), 1)
        with pytest.raises(GraderBroken, match="lacks one of score_1, score_2, ranking"):
            task.grade(problem, Reply(content="{}"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROW, "response_1": None}))
    with pytest.raises(UserError, match="row 1 of judge has no response_1"):
        asked(f"judge@{path}")
    path.write_text("")
    with pytest.raises(UserError, match="rows.jsonl has no rows"):
        asked(f"judge@{path}")


def test_a_judge_in_use_is_asked_what_it_was_trained_on(monkeypatch):
    plain = train_tokenizer([], vocab=SMALLEST)
    tokenizer = Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text("spaced"))
    seen = []

    async def drawn(answers, tokens, sampling, **more):
        seen.append(tokens)
        text = f"so.\n</think>\n\n{Judgement(score_1=2, score_2=4, ranking=5).text}"
        return Completion(prompt=tuple(tokens), text=text, tokens=(), logprobs=(), finish_reason="stop"), []

    monkeypatch.setattr(compared, "drawn", drawn)
    model = compared.RewardModel(answers=None, tokenizer=tokenizer)
    task = Judge()
    for problem in some(task, 20):
        first, second = answers_of(problem)
        asking = problem.messages[0]["content"].partition("user: ")[2].partition("\n\nanswer 1: ")[0]
        style = task.style.draw(random.Random(0), 1)
        other = type(style)(task="style", level=1, messages=user(asking), truth=style.truth)
        said = asyncio.run(model(other, Reply(content=first), Reply(content=second), 0))
        assert (said.score_1, said.score_2, said.ranking) == (2, 4, 5)
        wanted = chat_tokens(tokenizer, [*problem.messages], settings=ChatSettings(enable_thinking=task.thinks))
        assert seen[-1] == wanted
