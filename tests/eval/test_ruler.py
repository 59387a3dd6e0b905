"""What is asked is in the text once, lengths are kept, and who knows the answer gets all of it right."""

import random
import re

import pytest

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.eval.ruler import DEFAULT, PAIRS, TASKS, Example, keys, largest, question
from nautilus.runtime import UserError

TOKENIZER = train_tokenizer(["A number that belongs to the calm anchor is 1234567. old moon under water"], vocab=400)
BYTES = train_tokenizer([], vocab=SMALLEST)


def asked(task, length=4096, index=0, seed=0, tokenizer=TOKENIZER, **more):
    return question(task, length, index, seed=seed, tokens_of=tokenizer.encode, **more)


@pytest.mark.parametrize("task", [*DEFAULT])
@pytest.mark.parametrize("length", [2500, 4096])
def test_a_question_has_its_length_and_is_the_same_every_time(task, length):
    one = asked(task, length)
    assert len(one.tokens) + one.longest <= length and len(one.tokens) + one.longest > 0.93 * length
    assert one == asked(task, length) and one.tokens == TOKENIZER.encode(one.example.text)
    others = [asked(task, length, 1), asked(task, length, seed=1)]
    assert len({one.example.text, *(each.example.text for each in others)}) == 3
    assert one.example.score(f"I say {' and '.join(one.example.answers)}!".upper()) == 1


@pytest.mark.parametrize("task, names, values, wanted", [
    ("single", 1, 1, 1), ("multikey", 4, 1, 1), ("multivalue", 1, 4, 4), ("multiquery", 4, 1, 4),
])  # fmt: skip
def test_needles_are_in_the_text_once_with_their_names(task, names, values, wanted):
    for index in range(5):
        example = asked(task, 1500, index).example
        found = re.findall(r"A number that belongs to the (\w+ \w+) is (\d{7})\.", example.text)
        assert len(found) == names * values and len({name for name, _ in found}) == names
        question = example.text.rpartition("\n\n")[2]
        assert [number for name, number in found if name in question] and len(example.answers) == wanted
        assert sorted(example.answers) == sorted(number for name, number in found if name in question)
        assert all(example.text.count(number) == 1 for number in example.answers)


def test_the_variables_are_those_that_the_value_reaches():
    for index in range(5):
        example = asked("variables", 1500, index).example
        steps = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})\.", example.text))
        value = re.search(r"have the value (\d{5})", example.text)[1]
        reached, before = [], value
        while follower := next((name for name, source in steps.items() if source == before), None):
            reached.append(follower)
            before = follower
        assert tuple(reached) == example.answers and len(reached) == 5


def test_the_common_words_are_those_that_are_counted_most():
    example = asked("words").example
    listed = example.text.split("\n\n")[1].split()
    often = {word for word in listed if listed.count(word) == 30}
    assert often == set(example.answers) and len(often) == 10
    assert {listed.count(word) for word in {*listed} - often} == {3}


def test_pairs_are_asked_in_one_document_and_the_answer_follows():
    many = [asked("pairs", 400, index, tokenizer=BYTES) for index in range(2 * PAIRS)]
    texts = [one.example.text for one in many]
    assert all(texts[n + 1].startswith(texts[n] + many[n].example.answers[0]) for n in range(PAIRS - 1))
    assert texts[PAIRS][:40] != texts[0][:40] and all(one.longest == 1 for one in many)
    for one in many:
        key = one.example.text[-2]
        assert one.example.text.endswith(f" {key}?") and f" {key}={one.example.answers[0]}" in one.example.text
    assert 0.9 * 400 < max(len(text) for text in texts) <= 400


def test_a_score_is_the_share_of_what_was_asked_for():
    example = Example("", ("12", "ab"))
    assert [example.score(answer) for answer in ("12 AB", "ab", "1 2", "")] == [1, 0.5, 0, 0]
    first = Example("", ("a",), begins=True)
    assert [first.score(answer) for answer in ("a", " a", "ba")] == [1, 1, 0]


def test_a_length_that_is_too_short_is_refused_with_what_is_needed():
    with pytest.raises(UserError, match=r"task words of length=300 was asked for, .* takes \d+ tokens already"):
        asked("words", 300)
    assert asked("single", 600).longest + 100 == asked("single", 600, more=100).longest


@pytest.mark.parametrize("limit", [0, 1, 5, 1000])
def test_the_largest_size_is_found(limit):
    assert limit - max(1, limit // 200) <= largest(lambda size: size <= limit) <= limit


def test_an_interrupted_run_has_some_of_every_task():
    order = [*keys(["a", "b"], [20, 10], 3)]
    assert order[:4] == [("a", 10, 0), ("b", 10, 0), ("a", 20, 0), ("b", 20, 0)] and len({*order}) == 12


def test_all_tasks_are_drawn_from_the_seed_alone():
    for build in TASKS.values():
        assert build(random.Random(1), 40, 0) == build(random.Random(1), 40, 0) != build(random.Random(2), 40, 0)
