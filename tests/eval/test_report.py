import dataclasses
import json
import math

import pytest

from nautilus.eval import charts
from nautilus.eval.loss import HeldOut
from nautilus.eval.material import Report, Sample
from nautilus.eval.report import environment, gather, lead, render, write_picture, write_report
from nautilus.presets import preset
from nautilus.runtime import Run, UserError

pytest.importorskip("matplotlib")
HOSTILE = "</pre></script><script>alert(1)</script><img src=http://evil.example/x onerror=x>\" ' & \x00 \ud800 $x$"


def hostile(report):
    """The same report with every text replaced."""
    scores = tuple(dataclasses.replace(each, source=f"{HOSTILE}{i}") for i, each in enumerate(report.held_out.scores))
    rows = [row | {f"grad_norm.{HOSTILE}": 1.0, f"zero_grad.{HOSTILE}": 1.0} for row in report.rows]
    return Report(
        title=HOSTILE,
        config=report.config,
        settings={HOSTILE: {HOSTILE: [HOSTILE]}},
        rows=rows,
        held_out=HeldOut(scores=scores, spans=report.held_out.spans, loads={HOSTILE: [1.0, 2.0]}),
        samples=[Sample(prompt=HOSTILE, completion=HOSTILE, note=HOSTILE)],
        commands={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
    )


def check_harmless(page, found):
    """Nothing that runs, nothing that asks anybody for anything."""
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "img"}
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
        addresses = [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        assert all(address.startswith(("#", "data:image/png")) for address in addresses)
    styles = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in styles and "url(" not in styles


def test_hostile_text_stays_text(report, outline):
    page = render(hostile(report))
    found = outline(page)
    check_harmless(page, found)
    assert page.encode() and found.text.count("<script>alert(1)</script>") > 15


def test_a_page_is_well_formed_and_every_picture_is_described(report, outline):
    page = render(report)
    found = outline(page)
    check_harmless(page, found)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [each["href"] for each in found.named("a")]
    assert links and all(link.removeprefix("#") in ids for link in links)
    pictures, described = found.named("svg"), [each for each in found.named("div") if each.get("role") == "img"]
    assert len(pictures) == 10 and all(each["aria-hidden"] == "true" for each in pictures)
    assert len(described) == len(pictures) + 1 and all(len(each["aria-label"]) > 20 for each in described)
    assert len(found.named("summary")) >= len(pictures)


def test_an_empty_run_has_a_page_that_says_what_is_missing(outline):
    words = outline(render(Report(title="empty", config=preset("toy")))).text
    training = ("No step has been trained", "no prediction block", "no MaxVio", "no health metrics")
    measured = ("not been measured", "not been scored", "None were drawn", "Not recorded", "None were recorded")
    for expected in training + measured:
        assert expected in words, expected


def test_without_matplotlib_the_page_has_its_numbers_and_says_why(report, outline, monkeypatch):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    found = outline(render(report))
    assert not found.named("svg") and "[report]" in found.text
    assert [each for each in found.named("details") if "open" in each], "the tables stand open"
    with pytest.raises(UserError, match=r"\[report\]"):
        write_picture("never.png", report)


def test_a_run_folder_becomes_a_report(report, tmp_path, outline):
    run = Run.create(tmp_path / "demo", {"steps": 2, "seed": 0})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in report.rows[:2]) + '{"step": 2, "lo')
    collected = gather(run, report.config, commands={"Again": "nautilus demo"})
    assert (collected.title, len(collected.rows), collected.settings["steps"]) == ("demo", 2, 2)
    write_report(run.report, collected)
    page = outline(run.report.read_text(encoding="utf-8"))
    assert "nautilus demo" in page.text and "1.02 k tokens" in page.text


def test_the_picture_leaves_out_what_has_no_data(report, tmp_path):
    def width(some):
        write_picture(tmp_path / "picture.png", some)
        return int.from_bytes((tmp_path / "picture.png").read_bytes()[16:20])

    whole = width(report)
    assert width(dataclasses.replace(report, rows=())) * 3 == whole * 2
    assert width(dataclasses.replace(report, held_out=None)) * 3 == whole
    with pytest.raises(UserError, match="'demo'.*neither losses nor held-out scores"):
        write_picture(tmp_path / "none.png", dataclasses.replace(report, rows=(), held_out=None))


ODD = [None, "x", False, [1], {"a": 1}, -5, 0, 10**400, -(10**400), 1e308, 5e-324, math.nan, math.inf, -math.inf, 0.5]


def test_metrics_of_any_kind_make_a_report(report, tmp_path):
    """Rows may come from another version, or from somebody's editor: here every metric is everything in turn."""
    rows = [
        {name: ODD[(i + j) % len(ODD)] if name != "step" else i for j, name in enumerate(report.rows[0])}
        for i in range(2 * len(ODD))
    ]
    odd = dataclasses.replace(report, rows=rows)
    assert render(odd).startswith("<!doctype html>")
    write_picture(tmp_path / "report.png", odd)
    assert (odd.tokens, odd.memory_gb) == (0.5, 0.5)


def test_one_sentence_says_what_was_trained(report):
    assert lead(Report(title="t", config=preset("toy"))) == (
        "A language model of 7 layers (3 Mamba-2, 1 attention and 3 experts)."
    )
    assert lead(report).endswith("trained on 30.7 k tokens.")


def test_the_environment_names_versions_and_no_place():
    found = environment()
    assert {"Python", "torch", "processor", "threads"} <= found.keys() and all(found.values())
    assert not [value for value in found.values() if "/home" in value or "/tmp" in value]
