"""Chart geometry: bars are in proportion to the figures, on scales from zero (errors: logarithmic)."""

from __future__ import annotations

import math

import pytest

from optpass.report import charts, units


def change(before: float, after: float) -> units.Change:
    return units.Change(before, after, units.parameters)


def test_waterfall_bars_add_up() -> None:
    steps = [charts.Step("shrink", change(200, 120)), charts.Step("idle", change(120, 120))]
    steps.append(charts.Step("grow", change(120, 150)))
    chart = charts.waterfall("p", "Parameters", change(200, 150), steps)
    assert chart is not None
    before, shrink, idle, grow, after = chart.rows
    assert before.marks == (charts.Mark("total", 0, 100),)
    assert shrink.marks == (charts.Mark("rest", 0, 60), charts.Mark("less", 60, 40))
    assert idle.marks == (charts.Mark("rest", 0, 60), charts.Mark("same", 60, 0))
    assert grow.marks == (charts.Mark("rest", 0, 60), charts.Mark("more", 60, 15))
    assert after.marks == (charts.Mark("total", 0, 75),)
    assert [row.value for row in chart.rows[1:4]] == ["−80 (−40.0 %)", "unchanged", "+30 (+25.0 %)"]
    assert "shrink −40.0 %, grow +25.0 %" in chart.description


def test_waterfall_scale_covers_what_lies_between() -> None:
    chart = charts.waterfall("p", "P", change(100, 50), [charts.Step("grow", change(100, 400))])
    assert chart is not None
    assert chart.rows[0].marks[0].length == 25
    assert max(mark.start + mark.length for row in chart.rows for mark in row.marks) == 100


def test_waterfall_without_figures_is_left_out() -> None:
    assert charts.waterfall("p", "P", units.Change(None, 1.0, units.macs), []) is None
    zero = charts.waterfall("p", "P", change(0, 0), [])
    assert zero is not None
    assert zero.rows[0].marks[0].length == 0


def test_errors_stand_on_a_log_scale_beside_their_bound() -> None:
    chart = charts.errors([("a", 1e-6, 1e-3), ("b", None, None), ("c", 0.0, 1e-5), ("d", math.nan, None)])
    assert chart is not None
    a, b, c, d = chart.rows
    assert [mark.kind for mark in a.marks] == ["bound", "dot"]
    assert [mark.start for mark in a.marks] == pytest.approx([100 * 6 / 9, 100 * 3 / 9])
    assert (b.value, b.marks) == ("not measured", ())
    assert (c.value, c.marks[1].start) == ("0, equal", 0)
    assert (d.value, d.marks[0].start) == ("NaN", 100)
    assert charts.errors([("a", None, 1e-5)]) is None


def test_latency_marks_median_and_spread() -> None:
    timings = [charts.Timing("original", 40, 36, 48, 20), charts.Timing("optimised", 20, 18, 24, 20)]
    chart = charts.latencies(timings, "ms")
    assert chart is not None
    original, optimised = ({mark.kind: mark for mark in row.marks} for row in chart.rows)
    assert original["median"].start == pytest.approx(2 * optimised["median"].start)
    assert original["spread"].length == pytest.approx(2 * optimised["spread"].length)
    assert "20 calls each" in chart.note
    assert charts.latencies([], "ms") is None


def test_durations_are_in_proportion() -> None:
    chart = charts.durations([("a", 2.0), ("b", 0.5)], units.seconds)
    assert chart is not None
    assert [row.marks[0].length for row in chart.rows] == [100, 25]
    assert [row.value for row in chart.rows] == ["2 s", "500 ms"]


def test_long_names_lose_their_middle() -> None:
    row = charts.Row("12 a-very-long-pass-name-of-a-stranger", "", ())
    assert len(row.short_name) == charts.NAME_LIMIT
    assert row.short_name.startswith("12 a-very")
    assert row.short_name.endswith("a-stranger"[-6:])
