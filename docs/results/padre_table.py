"""PADRe's polynomials beside attention, one layer in ONNX Runtime, against the number of tokens."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path
from typing import NamedTuple

from attention_layer import faster, figures, layer, table, times, told

from optpass.analysis.cost import measure
from optpass.evaluate.latency import Ratio
from optpass.ir.program import Program
from optpass.passes.polynomial_attention import PolynomialAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.report.render import render_plot
from optpass.report.scatter import plot_of

SIDES = {192: (14, 20, 28, 40, 56, 80, 112, 128), 384: (14, 20, 28, 40, 56, 80, 112)}
"""Rows and columns of tokens, by channels."""
DEGREES = (2, 3)
SECONDS, LEAST, MOST = 4.0, 3, 40
"""About how long a row is measured, and of how many turns."""
DENSE = "attention"


class Row(NamedTuple):
    """Milliseconds of the forms of a layer, and their MACs."""

    width: int
    tokens: int
    times: dict[str, list[float]]
    macs: dict[str, int]

    def ratio(self, degree: int) -> Ratio:
        """Of the polynomial's time to attention's."""
        return Ratio.of(self.times[DENSE], self.times[_name(degree)])


def padre(page: Path) -> str:
    """The page; its plot is written beside ``page``."""
    rows = [_measured(width, side) for width, sides in SIDES.items() for side in sides]
    plot = page.with_suffix(".svg")
    plot.write_text(_plot(rows), "utf-8")
    parts = [TEXT.format(cores=os.cpu_count(), machine=platform.machine(), least=LEAST, most=MOST)]
    parts += [table(HEADER, map(_row, rows)), "\n".join(_crossings(rows)), MEMORY]
    return "\n\n".join([*parts, f"![Times as fast as attention, against tokens]({plot.name})"])


def _measured(width: int, side: int) -> Row:
    programs = _forms(layer((side, side), width))
    macs = {name: measure(program).totals.macs for name, program in programs.items()}
    return Row(width, side * side, times(programs, SECONDS, LEAST, MOST), macs)


def _forms(dense: Program) -> dict[str, Program]:
    passes = {_name(degree): PolynomialAttention(degree=degree, allow_more_macs=True) for degree in DEGREES}
    return {DENSE: dense, **{name: run_pass(dense, Step("padre", each))[0] for name, each in passes.items()}}


def _name(degree: int) -> str:
    return f"PADRe-{degree}"


def _row(row: Row) -> str:
    ratios = [row.ratio(degree) for degree in DEGREES]
    cells = [f"{row.tokens:,}", str(row.width), *map(told, row.times.values())]
    cells += map(faster, ratios)
    cells += [" / ".join(figures(count / 1e6) for count in row.macs.values()), str(len(row.times[DENSE]))]
    return f"| {' | '.join(cells)} |"


def _crossings(rows: Sequence[Row]) -> Iterator[str]:
    for width in SIDES:
        for degree in DEGREES:
            points = [(row.tokens, row.ratio(degree).median) for row in rows if row.width == width]
            pays = _pays(width, degree)
            fewer = f"fewer MACs from {pays:,} tokens on" if pays > 1 else "fewer MACs at any count"
            yield f"- d = {width}, degree {degree}: {_crossing(points)}; {fewer}."


def _crossing(points: Sequence[tuple[int, float]]) -> str:
    """Where the ratio comes below 1 for good, between two counts of tokens on logarithmic scales."""
    slower = [index for index, (_, ratio) in enumerate(points) if ratio >= 1]
    if not slower:
        return f"faster than attention in the median at every count from {points[0][0]} on"
    last = slower[-1]
    if last + 1 == len(points):
        return "faster than attention in the median at no count"
    (before, one), (after, other) = points[last], points[last + 1]
    share = log(one) / (log(one) - log(other))
    return f"as fast as attention at about {round(before * (after / before) ** share):,} tokens, faster beyond"


def _pays(width: int, degree: int) -> int:
    """Tokens at which both multiply as much, of a kernel of 11 × 11."""
    factors = 2 * degree - 1
    cost = factors * (width**2 + 121 * width) + (degree - 1) * width
    return max(1, -(-(cost - 4 * width**2) // (2 * width)))


def _plot(rows: Sequence[Row]) -> str:
    series = [
        {
            "name": f"{_name(degree)}, d = {width}",
            "points": [[row.tokens, 1 / row.ratio(degree).median] for row in rows if row.width == width],
        }
        for width in SIDES
        for degree in DEGREES
    ]
    record = {"title": "One layer, PADRe in the place of attention", "x": "tokens", "y": "times as fast"}
    plot = plot_of("padre", {**record, "series": series})
    assert plot is not None
    return render_plot(plot)


TEXT = """# PADRe beside attention

One layer, x + f(norm(x)) over a square grid of tokens, f being attention with its four projections (heads of 64
channels) or what `polynomial-attention` puts in its place, with kernels of 11 × 11. Random weights, float32, batch 1:
nothing here speaks of quality, which needs training. Letourneau et al., ICLR 2025, arXiv 2407.11306; the paper's
11 to 43 times are of a server's GPU and a phone's NPU.

ONNX Runtime on {cores} CPU cores ({machine}), shared, one thread. The three engines are called in turn, {least} to
{most} times; milliseconds are medians with p10 … p90, ratios those of the pairs. Attention is what this project lowers
it to, two products and a softmax, not a fused kernel."""
HEADER = "| tokens | d | attention, ms | PADRe-2, ms | PADRe-3, ms | 2 is faster | 3 is faster | M MACs | turns |"
MEMORY = "Scores of 6 heads among 16,384 tokens are 6.4 GB, and their softmax as much again: d = 384 ends before that."
