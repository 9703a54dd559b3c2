"""What a cut is forecast to save is what it saves: MACs and parameters, to the last one."""

from __future__ import annotations

import pytest
from axis_nets import small_net
from axis_oracle import choices, cut_program
from loops import cached

from optpass.analysis.axes import axes_of
from optpass.analysis.axes.costs import forecast
from optpass.analysis.cost import measure

COUNTED = (
    *("geglu", "qkv, fused", "q, k, v", "attention in two products", "shared heads, enable_gqa", "rotary, halves"),
    *("low rank", "tied weights", "batch matmul", "batch norm", "depthwise, multiplied", "grouped", "excited"),
    *("group norm over a skip", "transposed", "transposed, grouped", "pixel unshuffle", "windows"),
    *("einsum", "tensordot", "bilinear"),
)


def forecasts(program):
    """For all groups at half their size, and for each of them alone: forecast and measured."""
    found = axes_of(program)
    costs, half = forecast(program, found), choices(found)
    for choice in [half, *({i: kept} for i, kept in half.items())]:
        counts = {found.groups[i].atom: len(kept) for i, kept in choice.items()}
        after = measure(cut_program(program, choice).pruned()).totals
        yield (costs.macs(counts), costs.parameters(counts)), (after.macs, after.parameters)


@pytest.mark.parametrize("name", COUNTED)
def test_a_forecast_is_exact(name):
    for expected, measured in forecasts(small_net(name)):
        assert expected == pytest.approx(measured, rel=1e-12)


def test_nothing_cut_is_what_is_measured():
    program = small_net("q, k, v")
    costs, totals = forecast(program, axes_of(program)), measure(program).totals
    assert (costs.macs({}), costs.parameters({})) == (totals.macs, totals.parameters)


def test_entries_of_a_loop_count_by_how_often_they_run():
    program, _ = cached()
    costs, totals = forecast(program, axes_of(program)), measure(program).totals
    assert costs.macs({}) == pytest.approx(totals.macs)
    for expected, measured in forecasts(program):
        assert expected == pytest.approx(measured, rel=1e-12)
