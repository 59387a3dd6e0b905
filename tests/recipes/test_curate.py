"""The curate recipe from the command line: a run with text, card, report; resumed with the same settings only."""

import gzip
import json
import random

import pytest

from nautilus.cli import main
from nautilus.data.corpus import sources, survey
from nautilus.data.curate import Result
from nautilus.data.tally import Tally
from nautilus.eval import curation
from nautilus.eval.curation import funnel, render

pytest.importorskip("datatrove")


def result(**changes) -> Result:
    dropped = Tally()
    dropped.drop("near duplicate", "near duplicate", "b.jsonl@7", "again")
    dropped.drop("quality", "gopher_<short>", "a.jsonl@0", "<script>alert(1)</script>")
    parts = {
        "before": Tally(documents=10, bytes=1000, edited=1, edited_bytes=4),
        "after": Tally(documents=8, bytes=966),
        "dropped": dropped,
        "sets": None,
        "skipped": ["x.png"],
    }
    return Result(**(parts | changes))


def test_the_steps_come_in_the_order_of_the_work_and_add_up():
    rows = funnel(result())
    assert [step for step, _, _ in rows] == ["found", "quality", "near duplicate", "edited", "kept"]
    assert sum(documents for _, documents, _ in rows[:-1]) == rows[-1][1] == 8
    assert sum(size for _, _, size in rows[:-1]) == rows[-1][2]


@pytest.mark.parametrize("reason", [None, "no matplotlib"])
def test_the_page_shows_examples_as_text_and_does_without_pictures(reason, monkeypatch):
    if reason:
        monkeypatch.setattr(curation.charts, "missing", lambda: reason)
    page = render("mine", result(sets=Tally(documents=5)))
    assert "&lt;script&gt;" in page and "<script>" not in page and "gopher_&lt;short&gt;" in page
    assert "x.png" in page and "5 texts of evaluation sets" in page and ("<svg" in page) == (reason is None)


def write(path, count: int) -> None:
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            words = ["".join(rng.choices("aeioulnrst", k=6)) for _ in range(80)]
            file.write(json.dumps({"text": " ".join(words) + "."}) + "\n")
        file.write(json.dumps({"text": "again and " * 40}) + "\n")


@pytest.mark.slow
def test_the_recipe_leaves_text_card_report_and_refuses_other_settings(tmp_path, capsys):
    write(tmp_path / "in.jsonl", 30)
    words = ["curate", f"data={tmp_path / 'in.jsonl'}", f"out={tmp_path / 'out'}", "filters=repetition"]
    assert main([*words, "workers=1"]) == 0
    shown = capsys.readouterr()
    assert "kept" in shown.out and f"data={tmp_path / 'out' / 'text'}" in shown.out
    assert "datatrove" not in shown.err and "MB/s" in shown.err and "left" in shown.err
    out = tmp_path / "out"
    assert "| repetition | " in (out / "README.md").read_text() and "30 documents" in (out / "README.md").read_text()
    assert (out / "report.html").exists() and (out / "report.png").read_bytes().startswith(b"\x89PNG")
    raw = gzip.decompress((out / "text" / "00000.jsonl.gz").read_bytes())
    lines = [json.loads(line) for line in raw.splitlines()]
    assert len(lines) == 30 and set(lines[0]) == {"id", "text"}
    (source,) = sources((str(out / "text"),))
    assert source.kind == "jsonl" and len(survey(source).train | survey(source).held_out) == 30
    assert main([*words, "workers=2"]) == 0  # all is done; more workers are no other settings
    assert main([*words, "workers=1", "near=false"]) == 2
    assert "near" in capsys.readouterr().err


def test_what_kept_nothing_is_not_called_text_to_train_on(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "too short"}\n')
    assert main(["curate", f"data={tmp_path / 'in.jsonl'}", f"out={tmp_path / 'out'}", "workers=1"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was kept" in shown and "train on it" not in shown
