"""The numbers are those that can be worked out by hand, and the intervals hold what they should."""

import csv
import json
import math
import random

import pytest

from nautilus.eval.speculation import (
    ALL,
    ORACLE,
    Answered,
    Band,
    Cycle,
    Draft,
    arms_of,
    bands,
    bootstrap,
    foretold,
    medians,
    numbers,
    payoff,
)
from nautilus.eval.speculation_report import HEAD, gather, summary, write
from nautilus.runtime import Run

PLAIN_CYCLES = [Cycle("plain", 1, 0)] * 10
COPIES = [Cycle("cache", 8, 5), Cycle("mtp", 3, 1), Cycle("plain", 1, 0), Cycle("plain", 1, 0)]


def answered(prompt, arm, seconds, cycles=PLAIN_CYCLES, same: bool | None = True, family="code", **more):
    fixed = {"target": "small", "set": "made", "tokens": 10}
    return Answered(
        **(fixed | more), family=family, prompt=prompt, arm=arm, seconds=seconds, cycles=cycles, same=same
    )  # fmt: skip


def pairs(speeds, arm="hvd", family="code", **more):
    for n, speed in enumerate(speeds):
        yield answered(f"{family} {n}", "plain", 1.0, family=family)
        yield answered(f"{family} {n}", arm, 1 / speed, COPIES, family=family, **more)


def of(found, arm, family="code"):
    return next(each for each in found if (each.arm, each.family) == (arm, family))


def test_speed_up_is_the_geometric_mean_of_paired_ratios():
    found = numbers([*pairs([2.0, 8.0])])
    hvd, plain = of(found, "hvd"), of(found, "plain")
    assert hvd.speed_up.mean == pytest.approx(4) and (hvd.speed_up.low, hvd.speed_up.high) == pytest.approx((2, 8))
    assert hvd.speed_up.reading == "faster" and str(hvd.speed_up) == "4.00 (2.00–8.00)"
    assert (plain.speed_up.mean, plain.tokens_per_s, hvd.tokens_per_s) == (1, 10, pytest.approx(20 / 0.625))
    # A prompt that only one of them answered has no pair.
    alone = [*pairs([2.0, 8.0]), answered("new", "hvd", 1e-9), answered("old", "plain", 1e9)]
    assert of(numbers(alone), "hvd").speed_up == hvd.speed_up


def test_an_answer_that_was_not_compared_or_differs_is_not_faster():
    lost = [*pairs([2.0, 2.0]), answered("x", "plain", 1.0), answered("x", "hvd", 0.01, COPIES, same=False)]
    hvd = of(numbers(lost), "hvd")
    assert hvd.speed_up.mean == pytest.approx(2) and (hvd.prompts, hvd.compared, hvd.same) == (3, 3, 2)
    hvd = of(numbers([*pairs([2.0, 2.0], same=None)]), "hvd")
    assert math.isnan(hvd.speed_up.mean) and (hvd.compared, hvd.same) == (0, 0)
    assert hvd.speed_up.reading == "not compared" and str(hvd.speed_up) == "–"


def test_cycles_are_counted_by_source_and_width():
    hvd = of(numbers([*pairs([2.0])]), "hvd")
    assert hvd.cycles_per_1000 == 400 and hvd.accepted == 6 / 4 and hvd.width == 13 / 4
    assert hvd.accepted_of == {"cache": 5, "mtp": 1, "plain": 0}
    assert hvd.cycles_of == {"cache": 0.25, "mtp": 0.25, "plain": 0.5}
    assert hvd.tokens_of == {"cache": 0.6, "mtp": 0.2, "plain": 0.2}
    assert hvd.widths == {"5-8": 0.25, "3-4": 0.25, "1": 0.5} and hvd.speed_up.reading == "no interval"
    wide = [answered("a", "plain", 1.0, [Cycle("cache", 65, 64)])]
    assert of(numbers(wide), "plain").widths == {"33-": 1}


def test_targets_and_families_are_kept_apart_and_all_has_every_prompt():
    answers = [*pairs([4.0, 4.0]), *pairs([1.0, 1.0], family="open")]
    answers += [answered("p", "plain", 3.0, target="large"), answered("p", "hvd", 1.0, target="large")]
    found = numbers(answers)
    keys = [(each.target, each.family) for each in found if each.arm == "hvd"]
    assert keys == [("small", "code"), ("small", "open"), ("small", ALL), ("large", "code")]
    assert of(found, "hvd", ALL).speed_up.mean == pytest.approx(2) and of(found, "hvd", ALL).prompts == 4
    assert of(found, "hvd", "open").speed_up.reading == "inside noise"


def test_repeats_count_with_their_median_time():
    answers = [*pairs([2.0])] + [answered("code 0", "hvd", seconds) for seconds in (0.2, 0.9)]
    assert [one.seconds for one in medians(answers)] == [1.0, 0.5] and len(medians(answers + answers)) == 2


def test_the_share_of_the_oracle_is_paired_too():
    answers = [*pairs([2.0, 3.0])] + [answered(f"code {n}", ORACLE, 0.25, COPIES) for n in range(2)]
    found = numbers(answers)
    assert of(found, "hvd").of_oracle == pytest.approx(math.sqrt(0.5 * 0.75)) and of(found, ORACLE).of_oracle == 1
    assert arms_of(reversed(answers)) == ["plain", "hvd", "oracle"] and math.isnan(
        of(numbers([*pairs([2.0])]), "hvd").of_oracle
    )


def test_seconds_by_stage_are_shares_of_all_seconds():
    answers = [
        answered("a", "hvd", 2.0, spent={"draft": 0.5, "verify": 1.0}),
        answered("b", "hvd", 2.0, spent={"draft": 0.5}),
    ]
    assert numbers(answers)[0].spent == {"draft": 0.25, "verify": 0.25}


def test_the_interval_holds_the_truth_often_enough():
    draw, held = random.Random(0), 0
    for n in range(200):
        low, high = bootstrap([draw.gauss(0.3, 0.5) for _ in range(40)], seed=n)[1:]
        held += math.log(low) <= 0.3 <= math.log(high)
    assert 0.90 * 200 <= held <= 0.99 * 200
    assert bootstrap([0.1, 0.7]) == bootstrap([0.1, 0.7])


def test_a_few_drafts_give_most_of_the_gain():
    pays = payoff([Draft(0, 60)] + [Draft(0, 1)] * 30 + [Draft(0, 0)] * 69)
    assert pays.drafts == 100 and pays.high == 0.01
    assert pays.best == {0.01: pytest.approx(60 / 90), 0.05: pytest.approx(64 / 90), 0.1: pytest.approx(69 / 90),
                         0.25: pytest.approx(84 / 90), 0.5: 1}  # fmt: skip
    assert payoff([Draft(0, 3)] + [Draft(0, 1)] * 29).best[0.01] == pytest.approx(3 / 32)  # at least one
    assert all(map(math.isnan, payoff([Draft(0, 0)]).best.values())) and payoff([]).drafts == 0


def test_precision_and_recall_at_six():
    right, wrong, missed, rest = Draft(6.1, 6), Draft(9.0, 5), Draft(6.0, 64), Draft(0.0, 0)
    found = foretold([right] * 6 + [wrong] * 2 + [missed] * 4 + [rest] * 88)
    assert found == (100, 0.10, 0.08, 0.75, 0.6)
    assert foretold([wrong, Draft(math.nan, 64)]) == (1, 0, 1, 0, pytest.approx(math.nan, nan_ok=True))
    assert foretold([wrong], threshold=9).chosen == 0 and math.isnan(foretold([rest]).precision)


def test_bands_of_structure():
    answers = [
        *pairs([1.0, 1.0], copied=0.1),
        *pairs([4.0], family="agentic", copied=1.0),
        *pairs([9.0], family="open"),
    ]
    answers = [one for one in answers if one.arm != "plain"] + [
        answered(one.prompt, "plain", 1.0, family=one.family, copied=one.copied)
        for one in answers
        if one.arm != "plain"
    ]
    low, high = bands(answers, "hvd", lambda one: one.copied)
    assert low[:3] == (0.0, 0.25, 2) and high[:3] == (0.75, 1.0, 1) and isinstance(low, Band)
    assert low.speed_up.mean == pytest.approx(1) and high.speed_up.mean == pytest.approx(4)


def test_answers_can_be_kept_as_lines_of_json():
    drafts = [Draft(2.5, 7, False), Draft(math.nan, 3)]
    for one in (answered("p", "hvd", 0.5, COPIES, drafts=drafts, spent={"draft": 0.1}, copied=0.25, coded=1.0),
                answered("p", "hvd", 0.5, same=None)):  # fmt: skip
        again = Answered.of_row(json.loads(json.dumps(one.row())))
        assert again.row() == one.row() and repr(again.cycles) == repr(one.cycles)
        assert repr([*again.drafts]) == repr([*one.drafts]) and repr(numbers([again])) == repr(numbers([one]))


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"seconds": 0.0}, {"cycles": [Cycle("mtp", 2, 2)]}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="hvd on made p: tokens"):
        answered(**({"prompt": "p", "arm": "hvd", "seconds": 1.0} | wrong))


def study():
    draw = random.Random(0)
    for target in ("small", "la<rge"):
        for family in ("agentic", "open"):
            for n in range(6):
                for arm in ("plain", "hvd", "suffix", "oracle"):
                    speed = {"plain": 1.0, "hvd": 1.5, "suffix": 0.8, "oracle": 2.0}[arm] * draw.uniform(0.9, 1.1)
                    drafts = [Draft(draw.uniform(0, 9), draw.choice([0, 0, 1, 12]), n > 1)] * (arm in ("hvd", "suffix"))
                    yield answered(
                        f"{family} {n}", arm, 1 / speed, COPIES, target=target, family=family, copied=n / 5,
                        coded=0.3, drafts=drafts, spent={"draft": 0.1, "verify": 0.6}, same=arm != "suffix" or n > 0,
                    )  # fmt: skip


def test_the_report_has_every_arm_of_every_target_and_family(tmp_path):
    found = gather([*study()] * 2, title="HVD <1>", about="About.", command="nautilus …", facts={"machine": "m"})
    write(Run(tmp_path), found)
    page = (tmp_path / "report.html").read_text()
    assert "HVD &lt;1&gt;" in page and "la&lt;rge: speed-up" in page and "la<rge" not in page and "nan" not in page
    assert "10 of 12" in page and "78.0%–88.0%" in page and "cycles that ran" in page and page.count("<svg") == 7
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows["rows"]) == 2 * 3 * 4 and rows["facts"] == {"machine": "m"} and len(rows["drafts"]) == 4
    for row in rows["drafts"]:
        assert row["predictor"]["all"]["drafts"] == 12 and row["predictor"]["ran"]["drafts"] == 8
    assert {row["measure"] for row in rows["structure"]} == {"copied", "coded"}
    with (tmp_path / "results.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert len(lines) == 24 and [line["arm"] for line in lines[:4]] == ["plain", "hvd", "suffix", "oracle"]
    hvd = of([each for each in found.numbers if each.target == "small"], "hvd", "agentic")
    line = next(line for line in lines if (line["target"], line["family"], line["arm"]) == ("small", "agentic", "hvd"))
    assert float(line["speed_up low"]) == hvd.speed_up.low and float(line["cycles_of cache"]) == 0.25
    assert lines[0]["speed_up low"] == ""
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    tables = [*summary(found)]
    assert [table.row_count for table in tables] == [4] * 4 and len(tables[0].columns) == len(HEAD)


def test_a_report_of_little_has_no_holes(tmp_path):
    found = gather([answered("p", "plain", 1.0)], title="t", about="a", command="c")
    write(Run(tmp_path), found)
    page = (tmp_path / "report.html").read_text()
    assert (
        "No arm told of its copied drafts." in page
        and "No answer told of the structure" in page
        and "nan" not in page
        and (tmp_path / "report.png").exists()
    )
