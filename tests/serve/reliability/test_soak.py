"""A short soak, and that it sees what it is there for."""

import collections
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.serve.reliability import soak  # noqa: E402


@pytest.mark.slow
def test_twenty_seconds_of_mixed_load(tmp_path, capsys):
    status = soak.soak(tmp_path, minutes=20 / 60, clients=4)
    said = capsys.readouterr().out
    assert status == 0, said
    assert " 0 lost or mixed up" in said and "nothing runs any more" in said


def client(*failures):
    return SimpleNamespace(done=collections.Counter(plain=5), failures=list(failures))


FLAT, STEEP = [(0, 100.0), (10_000, 100.5), (20_000, 101.0)], [(0, 100.0), (10_000, 101.5)]


@pytest.mark.parametrize(
    "clients, found, seconds, load, status, said",
    [
        ([client()], FLAT, 600, [], 0, "+0.50 MiB per 10,000 requests (limit 1)"),
        ([client()], STEEP, 600, [], 1, "+1.50 MiB"),
        ([client()], STEEP, 20, [], 0, "not judged"),
        ([client(), client("plain: Wrong: x")], FLAT, 600, [], 1, "1 lost or mixed up\n  plain: Wrong: x"),
        ([client()], FLAT, 600, ["vllm:num_requests_running{} 1.0"], 1, "requests still run"),
    ],
)
def test_the_verdict(clients, found, seconds, load, status, said, capsys):
    assert soak.verdict(clients, found, seconds, load) == status
    assert said in capsys.readouterr().out
