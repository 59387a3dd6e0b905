import dataclasses

import pytest

from nautilus.config import to_dict
from nautilus.eval import sections
from nautilus.eval.material import Report, Sample
from nautilus.presets import preset


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(sections.charts, "missing", lambda: None)
    monkeypatch.setattr(sections.figures, "picture", lambda draw, *data, height=0: "<svg></svg>")


def test_the_headline_has_the_numbers_a_reader_comes_for(report, outline):
    words = outline(sections.headline(report)).text
    for expected in ("30.7 k", "60 steps", "30 s", "1,024", "1.750", "± 0.0", "xz 2.250, bzip2 2.250"):
        assert expected in words, expected


def test_a_report_without_metrics_has_a_headline_too(report, outline):
    bare = Report(title="t", config=report.config)
    assert len(outline(sections.headline(bare)).named("dt")) == 1


def test_nothing_unusual_needs_no_note(report):
    assert sections.notes(report) == ""


def test_what_is_wrong_is_said_at_the_top(report, outline, monkeypatch):
    monkeypatch.setattr(sections.charts, "missing", lambda: "Pictures need matplotlib.")
    rows = [{"step": 0, "loss": None, "dead_experts": 0}, {"step": 1, "loss": 2.0, "dead_experts": 3}]
    worse = dataclasses.replace(report.held_out.scores[0], source="<prose>", xz_bytes=10)
    held_out = dataclasses.replace(report.held_out, scores=(worse, report.held_out.scores[1]))
    words = outline(sections.notes(dataclasses.replace(report, rows=rows, held_out=held_out))).text
    for expected in (
        "need matplotlib",
        "saw no token in step 1: 3",
        "not a number: 1, the first is step 0",
        "on <prose>.",
    ):
        assert expected in words, expected


def test_the_strip_shows_every_layer_in_order(outline):
    config = preset("nano")
    found = outline(sections.model_part(Report(title="t", config=config)))
    assert "".join(words for words in found.words if words in "M*E")[: len(config.layers)] == config.pattern
    spoken = [each["aria-label"] for each in found.named("div") if each.get("role") == "img"]
    assert spoken == [f"Layers {config.pattern}"]


def test_layers_of_all_kinds_have_a_colour_and_a_name(outline):
    layers = preset("toy").layers + preset("nemotron_h_4b").layers[:2]
    linear, nothing = (sections.KINDS[letter] for letter in "L_")
    assert (linear, nothing) == ("linear", "nothing")
    assert all(f'class="{sections.KINDS[layer.letter]}"' in sections.tag(layer) for layer in layers)


def test_settings_are_listed_by_their_dotted_names():
    settings = {"a": 1, "b": {"c": [1, 2], "d": {}}, "model": to_dict(preset("toy")), "e": "text"}
    found = dict(sections.flat(settings))
    assert found["a"] == "1" and found["b.c"] == "[1, 2]" and found["b.d"] == "{}" and found["e"] == "text"
    assert found["model.layers"] == "MEM*EME" and found["model.mtp"] == "*E"


def test_a_model_without_experts_says_so(report, outline):
    dense = dataclasses.replace(report, config=preset("nano_4b"))
    assert "no experts" in outline(sections.experts_part(dense)).text


def test_the_prompt_is_told_apart_from_the_completion(outline):
    found = outline(sections.sample_card(Sample(prompt="<b>\n", completion="</b> & more", note="seed 1")))
    assert [tag for tag, _ in found.elements] == ["div", "pre", "b", "p"]
    assert [words for words in found.words if words.strip()] == ["<b>\n", "</b> & more", "seed 1"]
