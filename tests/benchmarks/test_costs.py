"""What steps cost by sizes alone, by hand; and whole models added up from slices."""

import argparse
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.presets import preset

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def headline():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("headline_under_test", FOLDER / "headline.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def costs(headline):
    return sys.modules["costs"]


def test_the_sizes_of_published_models(costs):
    nano = costs.sizes_of(preset("nano"))
    assert nano.weights == 31_577_940_288 and 3.22e9 < nano.active < 3.24e9
    assert nano.kv == 6 * 2 * 2 * 128 and nano.state == 23 * (64 * 64 * 128 + 6144 * 3)
    assert nano.routed == 23 * 128 * 2 * 1856 * 2688 and (nano.experts, nano.chosen) == (128, 6)
    super_ = costs.sizes_of(preset("super"))
    assert super_.weights == 120_668_707_840 and super_.kv == 8 * 2 * 2 * 128
    assert super_.routed == 40 * 512 * 2 * 2688 * 1024, "in latent space"
    peer = costs.sizes_of(preset("qwen3_30b_a3b"))
    assert peer.kv == 48 * 2 * 4 * 128 and not peer.state and 3.0e9 < peer.active < 3.4e9
    assert peer.work == 48 * 4 * 32 * 128
    near = costs.sizes_of(preset("gpt_oss_20b"))
    assert near.kv == near.near == 12 * 2 * 8 * 64 and near.window == 128


def test_the_bytes_of_a_step_by_hand(costs):
    sizes = costs.Sizes(
        weights=1000,
        active=300,
        routed=800,
        experts=4,
        chosen=1,
        kv=10,
        near=6,
        window=5,
        state=50,
        work=8,
        near_work=2,
    )
    stored = costs.Bytes(weight=0.5, kv=2, state=4)
    assert costs.parts(sizes, stored, 1, 100) == {
        "weights": 0.5 * (200 + 800 / 4), "states": 4 * 2 * 50, "keys and values": 2 * (10 * 100 + 6 * 5),
    }  # fmt: skip
    two = costs.parts(sizes, stored, 2, 3)
    assert two["weights"] == 0.5 * (200 + 800 * (1 - 0.75**2)) and two["keys and values"] == 2 * 2 * (10 * 3 + 6 * 3)
    assert costs.flops(sizes, 2, 100) == 2 * (600 + 800 + 10)
    assert costs.user_bytes(sizes, stored, 100) == 200 + 2 * (1000 + 30)
    whole = costs.Sizes(**{**vars(sizes), "keeps_near": True})
    assert costs.user_bytes(whole, stored, 100) == 200 + 2 * 1600


def test_a_step_waits_for_the_slower_of_memory_and_arithmetic(costs):
    sizes, stored = costs.Sizes(weights=1000, active=1000, kv=1), costs.Bytes(weight=1, kv=1)
    slow_memory = costs.Device(memory=1e4, bandwidth=10, peak=1e9)
    assert costs.step_seconds(sizes, stored, slow_memory, 1, 0) == 100
    slow_sums = costs.Device(memory=1e4, bandwidth=1e9, peak=10)
    assert costs.step_seconds(sizes, stored, slow_sums, 3, 0) == 600


def test_as_many_users_as_fit(costs):
    sizes, stored = costs.Sizes(weights=1000, active=100, kv=1), costs.Bytes(weight=1, kv=1)
    device = costs.Device(memory=2005 / costs.SHARE, bandwidth=1e3, peak=1e30)
    assert costs.most_users(sizes, stored, device, 10) == 100
    speed = costs.tokens_per_second(sizes, stored, device, 6, 4, 100)
    assert speed == pytest.approx(100 / ((1000 + 100 * 8) / 1e3))
    busy = costs.Device(memory=1e4, bandwidth=1e30, peak=100)  # reading 2 tokens takes as long as writing them
    assert costs.tokens_per_second(sizes, stored, busy, 2, 2, 5) == pytest.approx(0.5 / 2)
    small = costs.Device(memory=900, bandwidth=1, peak=1)
    assert costs.most_users(sizes, stored, small, 10) == 0
    assert device.times(3) == costs.Device(memory=3 * device.memory, bandwidth=3e3, peak=3 * 1e30)


def test_a_whole_model_is_the_sum_of_its_layers(headline):
    mamba, experts, attention = Mamba(heads=8), Experts(experts=4, active=1, hidden=8), Attention(heads=2, groups=1)
    costs = headline.costs_of(10.0, {mamba: 14.0, experts: 12.0, attention: 10.5})
    assert costs.layers == {mamba: 2.0, experts: 1.0, attention: 0.25} and costs.rest == 6.75
    assert costs.step(Counter({mamba: 1, experts: 1, attention: 1})) == 10.0
    assert costs.step(Counter({mamba: 23, experts: 23, attention: 6}), scale=8) == 8 * 6.75 + 46 + 23 + 1.5


def test_slices_add_up_to_the_model_that_takes_what_they_say(headline, monkeypatch):
    """With timings made up of so much a layer, the whole comes out as it must."""
    mamba, experts, attention = Mamba(heads=8), Experts(experts=4, active=1, hidden=8), Attention(heads=2, groups=1)
    config = Config(vocab=2 * headline.VOCAB, width=16, layers=lay("MEM*EME", mamba, attention, experts))
    took = {mamba: 1.0, experts: 2.0}

    def timed(slice, asked, contexts):
        assert slice.vocab == headline.VOCAB
        return {
            (users, context): 5 + sum(took.get(layer, users * context / 100) for layer in slice.layers)
            for users in asked.users
            for context in contexts
        }

    monkeypatch.setattr(headline, "timed", timed)
    monkeypatch.setattr(headline, "config_of", lambda name: config)
    asked = argparse.Namespace(users=[1, 3], contexts=[100, 400], shrink=False, rounds=2)
    rows = headline.measure("tiny", asked)
    assert [(row["users"], row["context"]) for row in rows] == [(1, 100), (1, 400), (3, 100), (3, 400)]
    for row in rows:
        whole = 2 * 5 + 3 * 1.0 + 3 * 2.0 + row["users"] * row["context"] / 100
        assert row["step_ms"] == pytest.approx(1e3 * whole) and row["check"] == pytest.approx(1)
        assert row["tokens_per_s"] == pytest.approx(row["users"] / whole)


def test_rounds_give_their_medians(headline, monkeypatch):
    rounds = iter([3.0, 1.0, 2.0])

    def once(name, asked):
        return [{"users": users, **dict.fromkeys(headline.MEASURED, users * factor)} for users in (1, 8)
                for factor in [next(rounds) if users == 1 else 5.0]]  # fmt: skip

    monkeypatch.setattr(headline, "measure_once", once)
    rows = headline.measure("tiny", argparse.Namespace(rounds=3))
    assert [(row["users"], row["step_ms"], row["check"]) for row in rows] == [(1, 2.0, 2.0), (8, 40.0, 40.0)]


def test_reported_pairs_by_sizes_alone(headline, capsys):
    for pair in headline.PAIRS:
        told = headline.tell(pair, {})
        assert told["by_sizes"] > 0 and min(told["users"]) > 0 and told["why"]
    assert "3.3 times reported" in capsys.readouterr().out
