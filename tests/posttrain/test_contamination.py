"""Words of held-out problems are found, and no others."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.posttrain.contamination import HeldBack, held_back, kept_out, words_of
from nautilus.posttrain.profile import exam
from nautilus.runtime import UserError
from nautilus.tasks import Problem
from nautilus.tasks.named import TASKS
from nautilus.tasks.task import user


def problem(text, system=""):
    return Problem(task="t", level=1, messages=user(text, system=system))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab c", max_size=12), max_size=4), st.text("abAB. c\n", max_size=30), st.integers(1, 4))
def test_a_text_hits_exactly_where_it_shares_so_many_words(known, text, length):
    held = HeldBack({"t": map(problem, known)}, length)
    grams = lambda words: {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}
    shared = any(grams(words_of(text)) & grams(words_of(one)) for one in known)
    same = bool(words_of(text)) and words_of(text) in [words_of(one) for one in known]
    assert (held.hit(text) is not None) == (shared or same)
    assert (held.hit("", text) is not None) == shared


def test_the_first_task_that_has_the_words_is_named():
    held = HeldBack({"one": [problem("a b c d")], "two": [problem("B, c! D e")]}, 3)
    assert held.hit("x B-C d y") == ("one", "b c d") and held.hit("c d E") == ("two", "c d e")
    assert held.hit("a b") is None and held.hit("A b: c d") == ("one", "a b c d")
    assert HeldBack({"one": [problem("?!")]}).hit("...") is None


def test_short_questions_are_known_by_their_whole_text_and_system_messages_by_none():
    system = "You are a helpful assistant who always answers at length"
    held = HeldBack({"sums": [problem("3 + 4 = ?", system=system)]}, 4)
    assert held.hit("3 + 4 = ?") == ("sums", "3 4") and held.hit("What is 3 + 4?") is None
    assert held.hit("", "3 4") is None and held.hit(system) is None


def test_everything_that_is_measured_on_is_held_back(tmp_path):
    asked = (f"question {number}" for number in range(30))
    rows = [{"responses_create_params": {"input": one}, "expected_answer": "A"} for one in asked]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"mcqa@{tmp_path / 'exam.jsonl'}"
    found = held_back(kept_out((name,)), 4)
    assert [*found] == [*TASKS, name] and len(found[name]) == 30
    for task in ("sort", "choice", "store"):
        one = TASKS[task]()
        measured = {problem.id for problem in exam(one, 4)} | {problem.id for problem in exam(one, 4, levels=[2])}
        assert measured <= {problem.id for problem in found[task]}
        held = HeldBack(found)
        hits = [held.hit(problem.messages[-1]["content"]) for problem in exam(one, 4)]
        assert all(hits) and {hit[0] for hit in hits} <= {*TASKS}
    assert HeldBack(found).hit("Question 7?") == (name, "question 7")


def test_a_task_that_is_not_there_says_so():
    with pytest.raises(UserError, match="there is no task 'sorts'"):
        kept_out(("sorts",))
