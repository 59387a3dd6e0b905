import dataclasses
import math

import pytest

from nautilus.eval import figures
from nautilus.eval.charts import Line
from nautilus.eval.figures import by_role, line_table, score_bars


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """The words and numbers alone: pictures have their own tests and take time."""
    monkeypatch.setattr(figures.charts, "missing", lambda: "none here")


def words_of(outline, html):
    return outline(html).text


def test_a_table_of_a_line_shows_a_dozen_steps_with_both_ends(outline):
    line = Line("loss", list(range(1000)), [float(i) for i in range(1000)])
    cells = outline(line_table([line, Line("rate", [0, 999], [0.5, 0.25])]))
    assert len(cells.named("tr")) == 1 + figures.ROWS
    assert [word for word in cells.words if word][:6] == ["step", "loss", "rate", "0", "0", "0.5"]
    assert [word for word in cells.words if word][-3:] == ["999", "999", "0.25"]
    assert len(outline(line_table([Line("loss", [7], [1.0])])).named("tr")) == 2


def test_the_loss_figure_tells_start_and_end(report, outline):
    words = words_of(outline, figures.loss_chart(report.rows))
    assert "From 9.000 to 3.1" in words and "60 steps" in words and "learning rate" in words


def test_a_run_without_prediction_block_says_so(report, outline):
    rows = [{key: value for key, value in row.items() if not key.startswith("mtp_")} for row in report.rows]
    assert "no prediction block" in words_of(outline, figures.depths_chart(rows))
    words = words_of(outline, figures.depths_chart(report.rows))
    assert "next token" in words and "2 tokens ahead" in words and "3 tokens ahead" in words


def test_a_metric_that_only_begins_like_a_depth_is_none(report):
    assert "prediction block" in figures.depths_chart([{"step": 0, "mtp_share": 0.5}])


def test_the_load_figure_names_the_busiest_layer_and_the_idle_experts(report, outline):
    words = words_of(outline, figures.load_chart(report.held_out.loads))
    assert "Busiest: 2.00 times the mean, layer 1." in words and "Without a token: 1 of 16." in words


def test_the_table_of_a_wide_layer_is_summed_up(outline):
    assert len(outline(figures.load_chart({"1": [1.0] * 32})).named("th")) == 4 + 32
    assert len(outline(figures.load_chart({"1": [1.0] * 33})).named("th")) == 4


def test_health_figures_without_data_are_left_out(report):
    makers = (figures.norm_chart, figures.residual_chart, figures.zeros_chart, figures.speed_chart)
    assert [make([]) for make in makers] == [""] * 4
    assert all(make(report.rows) for make in makers)


def test_the_embedding_is_no_sign_of_vanishing_gradients(report, outline):
    words = words_of(outline, figures.zeros_chart(report.rows))
    assert "Highest at the end: 0 (experts.gate)" in words and "embeddings" not in words


def test_roles_are_shown_as_last_seen(report):
    assert by_role(report.rows) == [("embeddings", 0.3, "12.500%")]


def test_the_worst_router_is_named(report, outline):
    assert "Worst at the end: 1.5 (layer 1)." in words_of(outline, figures.balance_chart(report.rows))


def test_bars_show_every_source_and_the_total(report):
    bars = score_bars(report.held_out)
    assert [bar.name for bar in bars] == ["python", "reference", "all"]
    assert bars[2].model == pytest.approx((1.5 * 8000 + 2.25 * 4000) / 12000)
    assert bars[0].others == {"xz": 2.0, "bzip2": 2.125}
    alone = dataclasses.replace(report.held_out, scores=report.held_out.scores[:1])
    assert [bar.name for bar in score_bars(alone)] == ["python"]


def test_the_total_stands_out_in_the_table(report, outline):
    rows = outline(figures.scores_chart(report.held_out)).named("tr")
    assert [row.get("class") for row in rows] == [None, None, None, "strong"]


def test_a_single_document_has_no_standard_error(report, outline):
    single = dataclasses.replace(report.held_out.scores[0], documents=1, standard_error=math.nan)
    words = words_of(outline, figures.scores_chart(dataclasses.replace(report.held_out, scores=(single,))))
    assert "1.500–2.000" in words and "nan" not in words


def test_documents_of_one_token_have_no_loss_by_position(report, outline):
    short = dataclasses.replace(report.held_out, spans=report.held_out.spans[:1])
    assert "one token long" in words_of(outline, figures.positions_chart(short))
    assert "second token costs 3.00 nats" in words_of(outline, figures.positions_chart(report.held_out))
