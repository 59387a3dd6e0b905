"""Answers are recorded once, in order; files that are no traces or prompts are one message."""

import dataclasses
import json

import pytest
import torch

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.traces import Asked, Trace, read_prompts, read_traces, record
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([], vocab=SMALLEST)


def engine_of():
    config = dataclasses.replace(shrink(preset("toy")), vocab=TOKENIZER.vocab, eos=(TOKENIZER.eos,), positions=120)
    model = Language(config).initialise(5).requires_grad_(False).eval()
    return Engine(model, TOKENIZER, rows=2)


def questions(texts, temperatures=(0.0, 0.6)):
    return [
        Asked(prompt=text, group=str(number), sampling=Sampling(temperature=temperature, seed=number, max_tokens=9))
        for number, text in enumerate(texts)
        for temperature in temperatures
    ]


def test_answers_are_recorded_once_and_in_order(tmp_path, monkeypatch):
    asked = questions(["abc", "the same", "x" * 130, "y" * 115])
    whole = record(engine_of(), asked, tmp_path / "whole.jsonl")
    assert [trace.group for trace in whole] == ["0", "0", "1", "1", "3", "3"], "one prompt is too long"
    assert [trace.tenant for trace in whole] == ["t0", "t0.6"] * 3
    for trace, one in zip(whole, asked[:4] + asked[6:], strict=True):
        alone = engine_of().generate([one.prompt], one.sampling)[0]
        assert (trace.prompt, trace.answer) == (alone.prompt, alone.tokens)
        assert trace.limit == min(120, len(alone.prompt) + 9)
    plain, path = Engine.step, tmp_path / "cut.jsonl"

    def interrupted(engine):
        if path.is_file() and len(path.read_text().splitlines()) >= 2:
            raise KeyboardInterrupt
        return plain(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record(engine_of(), asked, path)
    kept = path.read_text()
    path.write_text(kept + '{"step": 2, "ind')
    assert record(engine_of(), asked, path) == whole and path.read_text().startswith(kept)
    monkeypatch.setattr(Engine, "request", None)  # nothing more is asked
    assert record(engine_of(), asked, path) == whole


def test_traces_are_read_from_a_file(tmp_path):
    rows = [
        {"prompt": [1, 2], "answer": [3], "limit": 9, "tenant": "a", "group": "g", "depths": [2]},
        {"prompt": [1], "answer": [3, 4]},
    ]
    (tmp_path / "traces.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read_traces(tmp_path / "traces.jsonl") == [
        Trace(prompt=(1, 2), answer=(3,), limit=9, tenant="a", group="g", depths=(2,)),
        Trace(prompt=(1,), answer=(3, 4), limit=3),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "must be there"), ('{"prompt": [1], "answer": []}', "must be there"), ("[1]", "no trace"),
        ('{"prompt": [1], "answer": ["a"]}', "'a' stands among its tokens"), ('{"prompt": 5, "answer": [1]}', "trace"),
        ('{"prompt": [1], "answer": [-1]}', "-1 stands"), ('{"prompt": [1], "answer": [2], "limit": 1}', "limit=1"),
        ('{"prompt": [1], "answer": [2], "depths": [1, 2]}', "2 depths for 1"), ("{", "not JSON"), ("", "no traces"),
        ('{"prompt": [true], "answer": [2]}', "True stands"), 
        ('{"prompt": [1], "answer": [2], "limit": "9"}', "limit="),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_one_message(line, message, tmp_path):
    (tmp_path / "traces.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        read_traces(tmp_path / "traces.jsonl")


def test_prompts_are_read_from_texts_and_rows_each_once(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon\n\na time")
    (tmp_path / "b.txt").write_text("Once upon\n\na time")
    messages = [{"role": "user", "content": "Hello"}]
    rows = [{"prompt": "Go on"}, {"messages": messages}, {"prompt": "Go on"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [*read_prompts([str(tmp_path)])] == [
        ("a.txt", "Once upon\n\na time"),
        ("c.jsonl:1", "Go on"),
        ("c.jsonl:2", messages),
    ]
    (tmp_path / "d.jsonl").write_text('{"text": "no"}')
    with pytest.raises(UserError, match="d.jsonl line 1 has neither"):
        list(read_prompts([str(tmp_path / "d.jsonl")]))
    with pytest.raises(UserError, match="no text at"):
        list(read_prompts([str(tmp_path / "nothing")]))
