"""The ladder on the page: a row a pass, and no figure that nobody knows."""

from __future__ import annotations

from optpass.report.ladder_view import ladder_view
from optpass.report.render import render_report


def rung(name, macs, total=None, evaluations=None, **more):
    known = {"total": total, "total_attention": 0, "evaluations": evaluations, "parameters": 2_500_000}
    return {"name": name, "macs": macs, **known, **more}


def test_rows_have_what_is_known():
    first, second, third = ladder_view(
        {
            "ladder": [
                rung("captured", 4e9),
                rung("steps", 4e9, 40e9, 10),
                rung("cut", 2e9, 20e9, 10, total_attention=5e9, bound=True),
            ]
        }
    )
    assert (first.evaluations, first.each, first.sample, first.fewer) == ("—", "8 GFLOP", "—", "")
    assert (second.evaluations, second.sample, second.fewer) == ("10", "80 GFLOP", "1 ×")
    assert (third.sample, third.plain, third.fewer) == ("at most 40 GFLOP", "at most 30 GFLOP", "2 ×")
    assert third.parameters == "2.50 M"


def test_a_page_shows_the_ladder_where_there_is_one(svd_report):
    assert 'id="ladder"' not in render_report(svd_report, clips=None)
    page = render_report({**svd_report, "ladder": [rung("<script>", 4e9, 40e9, 10)]}, clips=None)
    assert 'id="ladder"' in page
    assert "80 GFLOP" in page
    assert "<script>" not in page.partition('id="ladder"')[2].partition("</section>")[0]
