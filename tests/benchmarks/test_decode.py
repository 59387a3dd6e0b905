"""The benchmarks of generation as far as they go without peers: our side of them, on models of toy size."""

import importlib
import pathlib

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.ops.cpu.library import native
from nautilus.presets import preset, shrink

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
TINY = Config(
    vocab=320,
    width=64,
    layers=lay(
        "ME*E",
        Mamba(heads=8, head_width=32, state=16, groups=2),
        Attention(heads=4, groups=2, head_width=32),
        Experts(experts=4, active=2, hidden=96, shared=64, latent=32, scale=2.5),
    ),
)
torch.set_num_threads(1)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_our_contestant_answers_every_piece_of_work(benchmark, monkeypatch):
    decode, llama_cpp = benchmark("decode"), benchmark("peers.llama_cpp")
    monkeypatch.setattr(llama_cpp, "shape", {"super": TINY}.__getitem__)
    monkeypatch.setattr(decode, "WORK", {"decode": (16, 1, 4), "8 sequences": (16, 8, 4), "prefill 512": (40, 1, 0)})
    ours = decode.Ours("super")
    answers = {work: ours.run(work) for work in decode.WORK}
    assert all(answer["tokens_per_second"] > 0 for answer in answers.values())
    assert 0 < answers["decode"]["bytes"] < answers["8 sequences"]["bytes"] and answers["prefill 512"]["bytes"] == 0
    bound = native().functions is not None
    assert [answer["share"] is not None for answer in answers.values()] == [bound, bound, False]


def test_every_piece_of_work_is_one_that_llama_cpp_knows(benchmark, monkeypatch):
    decode, llama_cpp = benchmark("decode"), benchmark("peers.llama_cpp")
    asked, speed = {}, llama_cpp.Speed(samples=(1.0,), settings="")
    for name in ("decode", "batched", "prefill"):
        monkeypatch.setattr(llama_cpp, name, lambda *_, name=name, **named: asked.update({name: named}) or speed)
    for work, (context, rows, steps) in decode.WORK.items():
        asked.clear()
        assert decode.llama(None, pathlib.Path("x.gguf"), work) == 1.0
        ((name, named),) = asked.items()
        assert name == ("prefill" if not steps else "batched" if rows > 1 else "decode")
        assert named["tokens"] == (steps or context)
        assert named.get("context", 16) == context or name == "prefill"


def test_a_released_folder_is_measured(benchmark, tmp_path):
    full_size, written = benchmark("full_size"), benchmark("write_released")
    written.write(shrink(preset("nano")), "nano_nvfp4", tmp_path)
    row = full_size.measure(tmp_path, turns=2)
    assert len(row["tokens_per_second"]) == 2 and min(row["tokens_per_second"]) > 0
    assert row["first_token_seconds"] >= row["opened_seconds"]
    assert (row["share_of_roofline"] > 0) == (native().functions is not None)
