"""What a model says of a text is read strictly, and what can be known without a model is found out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data.conversations import Conversation
from nautilus.data.conversations import fault as fault_of_conversation
from nautilus.data.corpus import Document
from nautilus.posttrain.synthetic import (
    KINDS,
    LETTERS,
    Bounds,
    Item,
    Unreadable,
    Writing,
    checks,
    conversation_of,
    facts,
    fault,
    problem_of,
    row_problem,
    standing,
)
from nautilus.runtime import UserError
from nautilus.tasks import Reply
from nautilus.tasks.rows import Rows, row_of

TEXT = "Marie Curie was born in 1867 in Warsaw. She won 2 Nobel prizes."
TRUTH = {"source": "a/1", "text": TEXT}
CHOICE = "Question: Where was she born?\nA) Paris\nB) Warsaw\nC) Bern\nD) Oslo\nAnswer: B"


def item(kind="question", **changes):
    options = ("Paris", "Warsaw", "Bern", "Oslo") if kind == "choice" else ()
    given = {"question": "Where was she born?", "answer": "Warsaw", "options": options, **TRUTH, **changes}
    return Item(kind=kind, **given)


def rephrased(answer, text=TEXT):
    return Item(kind="rephrase", source="a/1", text=text, answer=answer)


# ----- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "Question: When?\nAnswer: in 1867", "Here it is:\n\nQuestion: When?\n\nAnswer: in 1867.",
        "**Question:** When?\n**Answer:** in 1867", "question: When?\nANSWER: in 1867\n",
        "### Question: When?\n### Answer: in 1867",
    ],
)  # fmt: skip
def test_questions_are_read(said):
    assert KINDS["question"].read(said, TRUTH) == item(question="When?", answer="in 1867")


@pytest.mark.parametrize(
    "said, why",
    [
        ("", "no Question"), ("Question: When?", "no Answer"), ("Answer: x\nQuestion: y", "another order"),
        ("Question: a\nAnswer: b\nQuestion: c\nAnswer: d", "twice"), ("Question:\nAnswer: b", "nothing behind"),
        (f"Question: a\nAnswer: {'word ' * 13}", "long answer"), ("Question: a\nAnswer: b\nc", "lines or braces"),
        ("Question: a\nAnswer: {b", "lines or braces"), ("A question: x", "no Question"),
    ],
)  # fmt: skip
def test_what_is_no_question_says_why(said, why):
    with pytest.raises(Unreadable, match=why):
        KINDS["question"].read(said, TRUTH)


@pytest.mark.parametrize(
    "said", [CHOICE, CHOICE + ") Warsaw", CHOICE.replace("Answer: B", "**Answer:** (B)"), CHOICE.replace(")", ".")]
)
def test_choices_are_read(said):
    assert KINDS["choice"].read(said, TRUTH) == item("choice")


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("D) Oslo\n", "", "no D"), ("Answer: B", "Answer: Warsaw", "no letter"), ("Answer: B", "", "no Answer"),
        ("Answer: B", "Answer: E", "no letter"), ("Bern", "The warsaw", "options alike"), ("Oslo", "", "nothing"),
        ("Answer: B", "Answer: Both", "no letter"), ("A) Paris\nB) Warsaw", "B) Warsaw\nA) Paris", "another order"),
    ],
)  # fmt: skip
def test_what_is_no_choice_says_why(old, new, why):
    with pytest.raises(Unreadable, match=why):
        KINDS["choice"].read(CHOICE.replace(old, new), TRUTH)


@settings(max_examples=200, deadline=None)
@given(st.text("QuestionAwr:)(BCD.*#\n \\{}é\ud800", max_size=80), st.sampled_from([*KINDS]))
def test_nothing_that_is_said_breaks_the_reading(said, kind):
    try:
        found = KINDS[kind].read(said, TRUTH)
    except Unreadable:
        return
    assert found.kind == kind and (kind == "rephrase" or found.question and found.answer)
    assert fault(found, Bounds(), given=True) is not None
    if kind == "choice":
        assert found.answer in found.options and len(set(found.options)) == 4


def test_an_answer_that_was_cut_off_is_worth_nothing():
    task = Writing("question", [Document(source="a", name="1", text=TEXT)])
    (problem,) = task.asked
    assert TEXT in problem.messages[-1]["content"] and problem.truth == TRUTH
    whole, cut = (Reply(content="Question: a\nAnswer: b", ended=ended) for ended in (True, False))
    assert task.grade(problem, whole).reward == 1 and task.grade(problem, cut).why == "cut off"
    assert task.grade(problem, Reply(content="no")).why == "no Question"


# ----- sound or not ---------------------------------------------------------------------------------------------------


def test_facts_are_numbers_and_names():
    assert facts(TEXT) == {"1867", "2", "curie", "warsaw", "nobel"}
    assert facts("It cost 1,250.50 in May. However, nobody paid 3,000 of it.") == {"1250.50", "may", "3000"}
    assert facts("no fact here. None at all") == set()
    assert standing("nothing", "") == 1 and standing(TEXT, "Curie, of Warsaw") == 0.4


@settings(max_examples=100, deadline=None)
@given(st.text("aB 1,.\n", max_size=60))
def test_a_text_has_all_of_its_own_facts(text):
    assert standing(text, text) == 1


@pytest.mark.parametrize(
    "answer, why",
    [
        ("Warsaw is where Curie was born, in 1867; she was given 2 Nobel prizes.", ""),
        ("Warsaw is where she was born, in 1867; she was given 2 Nobel prizes.", "loses numbers or names"),
        ("Warsaw is where Curie was born, in 1876; she was given 2 Nobel prizes.", "loses numbers or names"),
        ("Warsaw is where Curie was born, in 1867; at 44 she had 2 Nobel prizes.", "adds numbers or names"),
        ("Warsaw saw Curie born in 1867, and Bern saw her with 2 Nobel prizes.", "adds numbers or names"),
        (TEXT, "the text itself"), ("1867 Warsaw 2 Nobel", "too short"), (TEXT * 2, "too long"), ("", "too short"),
    ],
)  # fmt: skip
def test_a_rephrasing_keeps_what_its_text_says(answer, why):
    assert fault(rephrased(answer), Bounds(), given=True) == why


def test_bounds_can_be_left_open_and_cannot_be_senseless():
    anything = Bounds(shortest=0, longest=1e9, facts=0)
    assert fault(rephrased("x"), anything, given=True) == "" != fault(rephrased(TEXT), anything, given=True)
    for bad in ({"shortest": 2, "longest": 1}, {"facts": 1.5}, {"shortest": -1}, {"longest": float("nan")}):
        with pytest.raises(UserError, match="were asked for"):
            Bounds(**bad)


def test_questions_must_not_hold_their_answer_or_lean_on_a_text_that_is_not_there():
    assert fault(item(question="Was she born in Warsaw or Bern?"), Bounds(), given=True) == "answer in the question"
    assert fault(item(question="Was she born in Warsaw or Bern?", kind="choice"), Bounds(), given=True) == ""
    assert fault(item(question="In Warsaws?"), Bounds(), given=True) == ""
    leaning = item(question="What does the short text say of her?")
    assert [fault(leaning, Bounds(), given=shown) for shown in (True, False)] == ["", "asks of the text"]


# ----- as rows --------------------------------------------------------------------------------------------------------


def test_the_letter_follows_its_option_whatever_the_order():
    one = item("choice")
    found = checks(one, 24, seed=3)
    assert len({each.messages[-1]["content"] for each in found}) == 24
    for each in found:
        asked, letter = each.messages[-1]["content"], each.truth["expected_answer"]
        assert f"\n{letter}) Warsaw\n" in asked and asked.startswith(TEXT)
    assert {each.truth["expected_answer"] for each in found} == set(LETTERS)
    assert checks(one, 3, seed=3) == checks(one, 3, seed=3) != checks(one, 3, seed=4)


@pytest.mark.parametrize("kind, task", [("question", "exact"), ("choice", "mcqa")])
@pytest.mark.parametrize("shown", [True, False])
def test_a_rows_worked_answer_is_right_by_the_task_that_reads_it(kind, task, shown):
    problem = row_problem(item(kind), given=shown, seed=0)
    rows = Rows(task, [row_of(problem)])
    (read,) = rows.rows
    assert rows.grade(read, Reply(content=read.worked[0]["content"])).reward == 1
    assert rows.grade(read, Reply(content="\\boxed{E}")).reward == 0
    assert (TEXT in read.messages[-1]["content"]) == shown and read.id == problem.id
    conversation = conversation_of(item(kind), given=shown, seed=0)
    assert conversation["messages"] == [*problem.messages, *problem.worked]


def test_answers_in_words_are_not_products_of_letters():
    rows = Rows("exact", [row_of(problem_of(item(answer="listen"), given=False))])
    reward = lambda said: rows.grade(rows.rows[0], Reply(content=f"\\boxed{{{said}}}")).reward
    assert [reward(said) for said in ("listen", "Listen!", "the listen", "silent", "listens", "")] == [1, 1, 1, 0, 0, 0]
    two = Rows("exact", [row_of(problem_of(item(answer="New York"), given=False))])
    found = [two.grade(two.rows[0], Reply(content=f"\\boxed{{{said}}}")) for said in ("new  york.", "York New")]
    assert [one.reward for one in found] == [1, 0]
    number = Rows("exact", [row_of(problem_of(item(answer="1,200"), given=False))])
    said = [Reply(content=f"\\boxed{{{value}}}") for value in ("1200", "1,200.0", "12")]
    assert [number.grade(number.rows[0], one).reward for one in said] == [1, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_conversations_to_learn_from(kind):
    one = rephrased("In other words.") if kind == "rephrase" else item(kind)
    row = conversation_of(one, given=True, seed=1)
    assert fault_of_conversation(Conversation(messages=row["messages"])) == ""
    assert row["kind"] == kind and row["source"] == "a/1" and TEXT in row["messages"][0]["content"]
