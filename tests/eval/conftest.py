import html.parser
import math

import pytest

from nautilus.eval.loss import HeldOut, Score, Span
from nautilus.eval.material import Report, Sample
from nautilus.presets import preset, shrink

VOID = {"meta", "link", "br", "hr", "img", "input"}
SELF_CLOSED = {"path", "use", "rect", "image", "circle", "line"}


class Outline(html.parser.HTMLParser):
    """What a browser would build of a page: every element with its attributes, and all text; unbalanced tags fail."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def outline():
    return Outline


def make_rows(config, steps=60):
    """Metrics as the training loop writes them, with check-ups at every tenth step."""
    rows = []
    for step in range(steps):
        loss = 2 + 4 * math.exp(-step / 15)
        row = {"step": step, "loss": 1.5 * loss, "lr": 1e-3, "grad_norm": 1 / (1 + step), "tokens": 512 * (step + 1)}
        row |= {"tokens_per_s": 1024.0, "memory_gb": 0.5, "next_token": loss, "mtp_1": loss + 1, "mtp_2": loss + 2}
        if step % 10 == 0:
            row |= {f"residual_rms.{i}": 0.1 * (i + 1) for i in range(len(config.layers))}
            row |= {f"max_vio.{i}": 1.5 for i, layer in enumerate(config.layers) if layer.letter == "E"}
            row |= {"max_vio.mtp.1": 1.25, "dead_experts": 0}
            row |= {"grad_norm.embeddings": 0.3, "zero_grad.embeddings": 0.125, "zero_grad.experts.gate": 0.0}
        rows.append(row)
    return rows


def make_score(source, size, bits, xz, bz2):
    nats = bits * size * math.log(2)
    compressed = {"xz_bytes": int(xz * size / 8), "bz2_bytes": int(bz2 * size / 8)}
    return Score(source=source, documents=3, tokens=size // 3, bytes=size, nats=nats, standard_error=0.02, **compressed)


@pytest.fixture
def report():
    """A run with everything in it."""
    config = shrink(preset("super"))
    spans = (Span(first=0, last=0, tokens=6, nats=4.6), Span(first=1, last=1, tokens=6, nats=3.0))
    return Report(
        title="demo",
        config=config,
        settings={"steps": 60, "data": {"sources": ["embedded"], "reset": True}},
        rows=make_rows(config),
        held_out=HeldOut(
            scores=(make_score("python", 8000, 1.5, 2.0, 2.125), make_score("reference", 4000, 2.25, 2.75, 2.5)),
            spans=(*spans, Span(first=2, last=3, tokens=12, nats=2.5)),
            loads={"1": [0.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "3": [1.0] * 8},
        ),
        samples=(Sample(prompt="def f(", completion="x):\n    return x", note="greedy"),),
        commands={"Talk to it": "nautilus chat runs/demo"},
        environment={"Python": "CPython 3.11.0"},
    )
