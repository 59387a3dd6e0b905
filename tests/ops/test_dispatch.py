import logging

import pytest

from nautilus.ops import attention, conv, experts, loss, norm, ssd
from nautilus.ops.dispatch import Impl, choose


def fast():
    return "fast"


def slow():
    return "slow"


def needs_even(size, **_):
    return None if size % 2 == 0 else f"size {size} is odd"


IMPLS = (Impl("fast", fast, needs_even), Impl("slow", slow))


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("NAUTILUS_OPS", raising=False)


def test_the_first_that_accepts_is_taken():
    assert choose("op", IMPLS, 4) is fast
    assert choose("op", IMPLS, 3) is slow


def test_the_inputs_reach_the_question_by_name_too():
    asked = Impl("asked", fast, lambda x, *, chunk: f"chunk {chunk} is not {x}" if chunk != x else None)
    assert choose("op", (asked, IMPLS[1]), 8, chunk=8) is fast
    assert choose("op", (asked, IMPLS[1]), 8, chunk=7) is slow


def test_a_refusal_is_logged_with_its_reason_and_once(caplog):
    with caplog.at_level(logging.INFO, logger="nautilus.ops"):
        for _ in range(3):
            choose("logged op", IMPLS, 5)
        choose("logged op", IMPLS, 7)
        choose("logged op", IMPLS, 4)
    assert [r.getMessage() for r in caplog.records] == [
        "logged op: not 'fast', because size 5 is odd",
        "logged op: not 'fast', because size 7 is odd",
    ]


def test_one_can_be_forced_by_name(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "slow")
    assert choose("op", IMPLS, 4) is slow
    monkeypatch.setenv("NAUTILUS_OPS", "fast")
    assert choose("op", IMPLS, 4) is fast


def test_forcing_one_that_refuses_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "fast")
    with pytest.raises(RuntimeError, match="op: 'fast' was forced but size 3 is odd"):
        choose("op", IMPLS, 3)


def test_forcing_an_unknown_name_is_an_error_that_lists_the_names(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "fats")
    with pytest.raises(RuntimeError, match=r"no implementation named 'fats'; have \['fast', 'slow'\]"):
        choose("op", IMPLS, 4)


@pytest.mark.parametrize(
    "impls",
    [
        attention.ATTENTION_IMPLS,
        conv.CONV_IMPLS,
        experts.EXPERTS_IMPLS,
        loss.LOGPROB_IMPLS,
        loss.NLL_IMPLS,
        norm.RMS_NORM_IMPLS,
        norm.GATED_NORM_IMPLS,
        ssd.SSD_IMPLS,
    ],
)
def test_every_op_ends_in_a_reference_that_accepts_everything(impls):
    assert impls[-1].name == "reference" and impls[-1].function.__name__.endswith("_reference")
    assert impls[-1].accepts(object(), anything=1) is None
    assert len({impl.name for impl in impls}) == len(impls)
