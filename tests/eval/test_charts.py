import re
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nautilus.eval import charts
from nautilus.eval.charts import DARK, LIGHT, Bar, Line, shade, short, shortened, svg
from nautilus.runtime import UserError

pytest.importorskip("matplotlib")
LOSS = Line("loss", [0, 1, 2], [3.0, 2.0, 1.5], faint=[3.1, 2.1, 1.4])
BARS = [Bar("python", 1.5, 0.1, {"xz": 2.0, "bzip2": 2.1}), Bar("prose", 2.5, float("nan"), {"xz": 2.2, "bzip2": 2.0})]
DRAWINGS = {
    "loss": (charts.draw_loss, LOSS, Line("rate", [0, 1, 2], [0.0, 1e-3, 1e-4])),
    "loss alone": (charts.draw_loss, LOSS),
    "lines": (charts.draw_lines, [LOSS, LOSS._replace(name="other")], "nats", "log", 1.0),
    "one point": (charts.draw_lines, [Line("loss", [0], [3.0])], "nats"),
    "depths": (charts.draw_depths, [LOSS, LOSS._replace(name="deep")], "MaxVio", "linear", 1.0),
    "one depth": (charts.draw_depths, [Line("layer 0", [0], [0.0])], "MaxVio", "log"),
    "loads": (charts.draw_loads, {"1": [0.0, 2.5, 0.5], "mtp.1": [1.0, 1.0]}),
    "bars": (charts.draw_bars, BARS),
    "positions": (charts.draw_positions, [(1, 1, 3.0), (2, 3, 2.5), (4, 7, 2.0)]),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_chart_is_one_element_in_the_colours_of_the_page(name, outline):
    draw, *data = DRAWINGS[name]
    picture = svg(draw, *data)
    elements = outline(picture).elements
    assert elements[0] == ("svg", {"aria-hidden": "true", "viewbox": elements[0][1]["viewbox"]})
    colours = set(re.findall(r"#[0-9a-f]{6}\b", picture))
    assert not colours, f"{colours} do not change with the colour scheme"
    assert set(re.findall(r"var\(--(\w+)\)", picture)) <= {*LIGHT, "font"}
    assert "<style" not in picture and "<metadata" not in picture
    assert not re.search(r"(href|src)=\"(?!#|data:image/png)", picture)


def test_the_same_data_gives_the_same_picture():
    assert svg(charts.draw_loads, {"1": [0.0, 2.0]}) == svg(charts.draw_loads, {"1": [0.0, 2.0]})


def test_a_line_of_one_point_is_visible():
    one, two = (svg(charts.draw_lines, [Line("loss", steps, [2.0] * len(steps))], "nats") for steps in ([0], [0, 1]))
    filled = "fill: var(--one)"
    assert filled in one and filled not in two, "a dot is filled, a line is not"


def test_two_charts_on_a_page_share_no_id(outline):
    pictures = "".join(svg(draw, *data) for draw, *data in DRAWINGS.values())
    ids = [attributes["id"] for _, attributes in outline(pictures).elements if "id" in attributes]
    assert ids and len(ids) == len(set(ids))
    used = re.findall(r"(?:url\(|href=\")#([^)\"]+)", pictures)
    assert set(used) <= set(ids)


@pytest.mark.parametrize("name", ["$\\frac{1}$", "</text><script>x</script>", "_hidden", "語" * 3, "a%b{c}", "-" * 99])
def test_a_source_may_have_any_name(name, outline):
    found = outline(svg(charts.draw_bars, [BARS[0]._replace(name=name)]))
    assert shortened(name) in found.text and not found.named("script")


def test_a_picture_is_a_png_with_all_its_parts(tmp_path):
    parts = [("Loss", *part[:1], part[1:]) for part in (DRAWINGS["loss alone"], DRAWINGS["bars"])]
    charts.png(tmp_path / "one.png", parts[:1])
    charts.png(tmp_path / "two.png", parts)
    sizes = []
    for name in ("one.png", "two.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.append((int.from_bytes(data[16:20]), int.from_bytes(data[20:24])))
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[report\]"):
        svg(charts.draw_loss, LOSS)


def test_charts_are_imported_without_matplotlib():
    code = "import sys, nautilus.eval.charts; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=50)
@given(load=st.floats(0, 3) | st.floats(3, 30), top=st.floats(2, 30))
def test_a_cell_is_clear_at_the_mean_and_stronger_the_further_from_it(load, top):
    red, _, blue, strength = shade(load, top)
    assert 0 <= strength <= 0.95 and (blue > red) == (load < 1)
    assert shade(1.0, top)[3] == 0
    further = load / 2 if load < 1 else load * 2
    assert shade(further, top)[3] >= strength


def test_axis_numbers_are_plain():
    assert [short(value) for value in (0, 0.002, 0.1 + 0.2, 999, 1200, 2.5e6, -3e9)] == [
        "0",
        "0.002",
        "0.3",
        "999",
        "1.2k",
        "2.5M",
        "-3B",
    ]


def test_the_dark_scheme_is_dark():
    assert DARK["card"] < LIGHT["card"] and DARK["ink"] > LIGHT["ink"]
