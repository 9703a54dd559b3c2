"""The section of measured modules: what is shown of a record, and that a damaged one leaves the page whole."""

from __future__ import annotations

import math

import pytest

from optpass import console
from optpass.report.render import render_report
from optpass.report.sensitivity_view import CHARTED, sensitivity_view


def module(path, power, real=False):
    noise = {"snr": -10 * math.log10(power), "error": math.sqrt(power)}
    return {
        "path": path,
        "operations": 2_500_000,
        "alone": noise,
        "without": {"snr": 30.0, "error": 0.03},
        "real": real,
    }


RECORD = {
    "budget": {"title": "snr", "bound": 35.0, "unit": "dB"},
    "figure": 36.25,
    "tried": [{"real": 0, "figure": 22.0}, {"real": 1, "figure": 36.25}],
    "together": {"snr": 22.0, "error": 0.08},
    "modules": [module("head", 1e-2, real=True), module("body.<0>", 1e-6)],
}


def view(**changes):
    return sensitivity_view({"passes": [{"name": "simplify"}, {"sensitivity": {**RECORD, **changes}}]})


def test_words_marks_and_rows():
    found = view()
    assert found.words == (
        "With all 2 modules in integers, outputs are at 22.0 dB. "
        "Asked for snr 35.0 dB: 1 stays real, which gives 36.2 dB (2 trials)."
    )
    head, body = found.chart.rows
    assert (head.name, head.value) == ("head", "20.0 dB, real")
    assert [(mark.kind, round(mark.start, 3)) for mark in head.marks][1] == ("dot", round(100 * (1 - 1 / 6), 3))
    assert body.marks[1].start == pytest.approx(50)
    assert [(row.path, row.operations, row.alone, row.real) for row in found.rows] == [
        ("head", "2.50", "20.0 dB", True),
        ("body.<0>", "2.50", "60.0 dB", False),
    ]


def test_the_chart_has_the_noisiest_and_the_table_all():
    found = view(modules=[module(f"m{index}", 1e-3) for index in range(CHARTED + 2)])
    assert (len(found.chart.rows), len(found.rows)) == (CHARTED, CHARTED + 2)
    assert found.chart.note.endswith(f"the noisiest {CHARTED} of {CHARTED + 2}")


def test_the_page_shows_it_escaped():
    page = render_report({"passes": [{"name": "sensitivity", "sensitivity": RECORD}]})
    assert 'id="sensitivity"' in page
    assert "body.&lt;0&gt;" in page
    assert "<0>" not in page


def test_the_console_shows_it():
    with console.out.capture() as captured:
        console.out.print(console.sensitivity_table(RECORD))
    assert "body.<0>" in captured.get()
    assert "1 stays real" in captured.get()


@pytest.mark.parametrize("record", [{}, {"modules": []}, {"modules": "none"}])
def test_what_cannot_be_shown_is_left_out(record):
    assert sensitivity_view({"passes": [{"sensitivity": record}]}) is None


def test_a_damaged_record_leaves_the_page_whole():
    page = render_report({"passes": [{"sensitivity": {"modules": [{"path": 3, "alone": [], "real": "x"}, {}]}}]})
    assert 'id="sensitivity"' in page
