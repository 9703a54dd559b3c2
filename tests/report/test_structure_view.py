from __future__ import annotations

from optpass.report.structure_view import MOST, structure_charts

PRUNED = {
    "name": "prune-channels",
    "pruning": [{"group": "up [ffn]", "before": 64, "after": 48}, {"group": "bad", "before": 0, "after": 0}],
}
REMOVED = {
    "name": "prune-blocks",
    "blocks": [
        {"path": "blocks.0", "importance": 0.02, "removed": True},
        {"path": "blocks.1", "importance": 0.4, "removed": False},
    ],
}


def test_what_stays_of_every_group_and_blocks_by_importance():
    groups, blocks = structure_charts({"passes": [{"name": "simplify"}, PRUNED, REMOVED]})
    [row] = groups.rows
    assert (groups.title, row.name, row.value) == ("Channels after 2 prune-channels", "up [ffn]", "64 → 48")
    assert [(mark.kind, mark.start, mark.length) for mark in row.marks] == [("rest", 0, 75.0), ("less", 75.0, 25.0)]
    assert [(row.name, row.value) for row in blocks.rows] == [("blocks.1", "0.400"), ("blocks.0", "0.0200, removed")]
    assert blocks.rows[1].marks[0].kind == "less"


def test_more_groups_than_fit_are_counted():
    many = [{"group": f"g{i}", "before": 4, "after": 2} for i in range(MOST + 3)]
    [chart] = structure_charts({"passes": [{"name": "prune-channels", "pruning": many}]})
    assert len(chart.rows) == MOST
    assert chart.note.endswith("3 more are not shown")


def test_a_report_without_pruning_has_none():
    assert structure_charts({}) == ()
