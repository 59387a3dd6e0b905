"""Where requests go, without anybody who answers them."""

import random

import pytest

from nautilus.serve.job import Job
from nautilus.serve.scale import routes
from nautilus.serve.scale.routes import CROWD, Routes

TWO = ["one", "two"]


def job(tokens, marks=(), tenant="a"):
    return Job(tokens=[*tokens], marks=marks, tenant=tenant)


def test_a_conversation_goes_where_it_was_and_a_new_one_where_least_is_known():
    sent, draw = Routes(), random.Random(0)
    talks = {name: [draw.randrange(300) for _ in range(40)] for name in "abcd"}
    went = {name: sent.choose(name, job(tokens), TWO)[0] for name, tokens in talks.items() if not sent.ended(name)}
    assert sorted(went.values()) == ["one", "one", "two", "two"]
    for turn in range(5):
        for name, tokens in talks.items():
            tokens += [draw.randrange(300) for _ in range(30)]
            id = f"{name}{turn}"
            assert sent.choose(id, job(tokens), TWO)[0] == went[name]
            sent.ended(id)


def test_only_what_ends_at_a_kept_state_counts():
    """A prompt is kept after its marks and at its end: one that shares less, or all but the end, finds nothing."""
    for marks, same, held in [((), 100, 100), ((), 99, 0), ((60,), 99, 60), ((60,), 59, 0), ((20, 60), 59, 20)]:
        sent = Routes()
        sent.choose("x", job(range(100), marks=marks), ["one"])
        assert sent.known["one"].held(job([*range(same), *range(500, 530)])) == held


def test_one_token_is_always_read():
    sent = Routes()
    sent.choose("x", job(range(100)), ["one"])
    assert sent.known["one"].held(job(range(100))) == 0


@pytest.mark.parametrize("length, goes", [(CROWD - 1, "two"), (CROWD + 1, "one")])
def test_a_short_prefix_is_not_worth_a_wait(length, goes):
    sent = Routes()
    sent.choose("x", job(range(length)), ["one"])
    assert sent.choose("y", job([*range(length), 1]), TWO)[0] == goes, "a request is under way at the first"
    sent.ended("x")
    sent.ended("y")
    assert sent.choose("z", job([*range(length), 2]), TWO)[0] == "one", "nobody waits any more"


def test_without_prefixes_the_least_loaded_is_asked():
    sent, draw = Routes(), random.Random(1)
    names = ["one", "two", "three"]
    for number in range(30):
        sent.choose(str(number), job(draw.choices(range(1000), k=50)), names)
    assert [list(sent.under_way.values()).count(name) for name in names] == [10, 10, 10]
    for id in [id for id, name in sent.under_way.items() if name == "two"]:
        sent.ended(id)
    assert sent.choose("next", job([1] * 50), names)[0] == "two"


def test_tenants_do_not_pull_each_other():
    sent = Routes()
    sent.choose("x", job(range(1000), tenant="a"), TWO)
    sent.ended("x")
    assert sent.choose("y", job(range(1000), tenant="b"), TWO)[0] == "two"


def test_who_is_asked_twice_counts_once_and_the_last_place_counts():
    sent = Routes()
    sent.choose("x", job(range(10)), TWO)
    sent.choose("x", job(range(10)), TWO)
    sent.sent("x", job(range(10)), "two")
    assert sent.under_way == {"x": "two"}


def test_what_a_lost_replica_knew_is_forgotten():
    sent = Routes()
    sent.choose("x", job(range(1000)), ["one"])
    sent.keep({"two"})
    assert sent.under_way == {} and "one" not in sent.known
    assert sent.choose("y", job(range(1000)), ["three", "two"])[0] == "three"


def test_memory_has_a_bound(monkeypatch):
    monkeypatch.setattr(routes, "MOST", 1000)
    sent = Routes()
    for number in range(100):
        sent.choose("x", job(range(number, number + 90), marks=(40,)), ["one"])
        known = sent.known["one"]
        assert known.tokens <= 1000 and known.tokens == sum(node.depth for node in known.tree)
        assert len(known.order) == len(known.tree)
    assert known.held(job([*range(99, 189), 7])) == 90 and known.held(job([*range(90), 7])) == 0
