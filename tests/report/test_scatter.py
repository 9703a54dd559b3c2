from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from optpass.report import scatter
from optpass.report.render import render_plot, render_report
from optpass.report.scatter import HEIGHT, LEFT, RIGHT, TOP, plot_of, plots

RECORD = {
    "title": "Quality",
    "x": "share of MACs",
    "y": "PSNR, dB",
    "series": [
        {"name": "channels", "points": [[0.2, 10, "ratio 0.2"], [1.0, 30, "<whole>"]]},
        {"name": "blocks", "points": [[0.6, 20]]},
    ],
}


def test_places_are_in_proportion():
    plot = plot_of("p", RECORD)
    assert plot is not None
    (low, high), (middle,) = (each.points for each in plot.series)
    assert (low.x, low.y, high.x, high.y) == pytest.approx((LEFT, TOP + HEIGHT, RIGHT, TOP))
    assert (middle.x, middle.y) == pytest.approx(((LEFT + RIGHT) / 2, TOP + HEIGHT / 2))
    assert [tick.label for tick in plot.y_ticks] == ["10", "15", "20", "25", "30"]
    assert plot.series[0].lines == [(low, high)]
    assert "channels: ratio 0.2: 0.200, 10" in plot.description


def test_ticks_are_round_and_cover_every_value():
    for values in ([0.0], [5, 5], [-3.2, 7.9], [1e-7, 3e-7], [0.957, 0.999]):
        axis = scatter._Axis(values)
        assert 2 <= len(axis.ticks) <= 8
        assert axis.ticks[0] <= min(values) + 1e-12
        assert axis.ticks[-1] >= max(values) - 1e-12
        assert all(0 <= axis.share(value) <= 1 + 1e-9 for value in values)


def test_without_figures_there_is_no_plot():
    assert plot_of("p", {"series": [{"name": "a", "points": [["x", 1], [1], 3, [float("nan"), 1]]}]}) is None
    assert plots({"plots": [3, {}, RECORD]})[0].title == "Quality"
    assert plots({}) == ()


def test_in_the_report_and_as_a_file():
    page = render_report({"plots": [RECORD]})
    assert 'href="#plots"' in page
    assert "&lt;whole&gt;" in page
    assert len(re.findall("<circle", page)) == 3 + 2
    plot = plot_of("p", RECORD)
    assert plot is not None
    root = ElementTree.fromstring(render_plot(plot))
    assert root.tag.endswith("svg")
    assert sum(node.tag.endswith("circle") for node in root.iter()) == 3 + 2
    assert "Quality and cost" not in render_report({})
