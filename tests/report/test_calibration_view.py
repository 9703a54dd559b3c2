"""The section of a calibrated cache: what is shown of a record, and that a damaged one leaves the page whole."""

from __future__ import annotations

import math

import pytest

from optpass.report.calibration_view import BAR, calibration_view
from optpass.report.render import render_report

RECORD = {
    "budget": {"speedup": 2.0},
    "speedup": 2.034,
    "psnr": 31.25,
    "steps": 5,
    "samples": 4,
    "computed": [1.0, 0.0, 0.5, 0.0, 0.0],
    "states": [1.0, 0.1, 0.005, math.nan],
    "blocks": {"blocks.<0>": [0.5, 0.01, 0.02, 0.03]},
}


def view(**changes):
    return calibration_view({"passes": [{"name": "simplify"}, {"calibration": {**RECORD, **changes}}]})


def test_bars_and_columns():
    found = view()
    assert found.words == "Asked for speedup 2.0: 2.03 times fewer MACs, 31.2 dB over 4 samples of 5 steps."
    assert [(bar.start, bar.height) for bar in found.columns] == [(0.0, 1.0), (40.0, 0.5)]
    states, block = found.strips
    # The first step has no change; what is below the scale, or no number, has no bar.
    assert [(bar.start, round(bar.height, 3)) for bar in states.bars] == [(20.0, BAR), (40.0, BAR / 2)]
    assert states.largest == "1"
    assert [bar.start for bar in block.bars] == [20.0, 60.0, 80.0]


def test_the_page_shows_it_escaped():
    page = render_report({"passes": [{"name": "calibrate-cache", "calibration": RECORD}]})
    assert 'id="calibration"' in page
    assert "blocks.&lt;0&gt;" in page
    assert "<0>" not in page


@pytest.mark.parametrize("record", [{}, {"steps": 1}, {"steps": "many"}, {"steps": 100_000}])
def test_what_cannot_be_shown_is_left_out(record):
    assert calibration_view({"passes": [{"calibration": record}]}) is None
    assert 'id="calibration"' not in render_report({"passes": [{"calibration": record}]})


def test_a_damaged_record_leaves_the_page_whole():
    page = render_report({"passes": [{"calibration": {"steps": 3, "blocks": {"a": "none", "b": [None, "x"]}}}]})
    assert 'id="calibration"' in page
