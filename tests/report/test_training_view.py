"""The section of trainings: what is shown of a record, and that a damaged one leaves the page whole."""

from __future__ import annotations

from itertools import pairwise

import pytest

from optpass.report.render import render_report
from optpass.report.training_view import POINTS, training_views

RECORD = {
    "weights": 3,
    "parameters": 1234,
    "updates": 400,
    "courses": 40,
    "device": "cpu",
    "precision": "fp32",
    "source": "<trajectories>",
    "sha256": "ab",
    "seed": 7,
    "first": 1.0,
    "last": 0.001,
    "losses": {"loss": [10.0 ** -(index / 100) for index in range(400)], "output": [1.0] * 400, "task": [0.0] * 400},
}


def views(**changes):
    return training_views({"passes": [{"name": "simplify"}, {"name": "distill", "training": {**RECORD, **changes}}]})


def test_words_and_curves():
    (found,) = views()
    assert found.words == (
        "2 distill: 3 weights of 1,234 parameters, 400 updates on <trajectories> (seed 7, fp32, cpu)."
        " The loss went from 1 to 0.00100, 1,000 times less."
    )
    assert "(seed 7, fp32, cpu, in 2 min 30 s)." in views(seconds=150)[0].words
    # A term that is zero throughout has no logarithm.
    assert [series.name for series in found.plot.series] == ["loss", "output"]
    curve = found.plot.series[0].points
    assert len(curve) == POINTS
    assert all(one.y < other.y for one, other in pairwise(curve))


def test_the_sum_of_one_term_is_not_shown_twice():
    (found,) = views(losses={"loss": [1.0, 0.5], "output": [1.0, 0.5]})
    assert [series.name for series in found.plot.series] == ["output"]


def test_the_page_shows_it_escaped():
    page = render_report({"passes": [{"name": "distill", "training": RECORD}]})
    assert 'id="training"' in page
    assert "&lt;trajectories&gt;" in page


@pytest.mark.parametrize(
    "record", [{"losses": 3}, {"losses": {"loss": ["x", None]}}, {"first": "much"}, {"weights": []}]
)
def test_damaged_records_leave_the_page_whole(record):
    assert "</html>" in render_report({"passes": [{"name": "distill", "training": {**RECORD, **record}}]})


def test_no_section_where_nothing_was_trained():
    assert 'id="training"' not in render_report({"passes": [{"name": "simplify"}]})
