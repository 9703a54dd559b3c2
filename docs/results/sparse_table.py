"""Sparse attention beside dense attention, one layer in ONNX Runtime, form by form."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

from attention_layer import faster, layer, table, times, told

from optpass.analysis.cost import measure
from optpass.evaluate.latency import Ratio
from optpass.passes.sparse_attention import SparseAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

WIDTH = 192
SECONDS, LEAST, MOST = 8.0, 5, 40
DENSE = "dense"
DRAFT = {"pattern": "draft", "pool": (8, 16), "sparsity": 0.9}
WINDOW = {"pattern": "window", "tile": (8, 8)}
GRIDS: dict[tuple[int, ...], tuple[int, int]] = {
    (16, 16): (2, 2),
    (32, 32): (4, 4),
    (64, 64): (7, 7),
    (4, 32, 64): (4, 8),
}
"""Rows and columns of tokens, behind frames, and the radius of windows there."""


def sparse() -> str:
    """The page."""
    head = TEXT.format(cores=os.cpu_count(), machine=platform.machine(), least=LEAST, most=MOST)
    return "\n\n".join([head, table(HEADER, (row for grid in GRIDS for row in _rows(grid))), TAIL])


def _forms(grid: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    windows = {**WINDOW, "radius": GRIDS[grid]}
    shown = " × ".join(map(str, GRIDS[grid]))
    return {
        f"window, radius {shown}, blocks": windows,
        f"window, radius {shown}, mask": {**windows, "form": "mask"},
        "draft per row, blocks": {**DRAFT, "per": "row"},
        "draft per row, mask": {**DRAFT, "per": "row", "form": "mask"},
        "draft per head, mask": DRAFT,
    }


def _rows(grid: tuple[int, ...]) -> Iterator[str]:
    programs = {DENSE: layer(grid, WIDTH)}
    for name, options in _forms(grid).items():
        programs[name], record = run_pass(programs[DENSE], Step("sparse-attention", SparseAttention(**options)))
        assert record.sites, f"{name} declined: {record.declined}"
    found = times(programs, SECONDS, LEAST, MOST)
    macs = {name: measure(program).totals.macs_attention / 1e9 for name, program in programs.items()}
    for name, each in found.items():
        ratio = Ratio.of(found[DENSE], each)
        gain = "" if name == DENSE else faster(ratio)
        cells = [" × ".join(map(str, grid)), name, f"{macs[name]:.3g}", told(each), gain, str(len(each))]
        yield f"| {' | '.join(cells)} |"


TEXT = """# Sparse attention beside dense attention

One layer, x + attention(norm(x)) with its projections, 192 channels in 3 heads, over a grid of tokens (frames ×) rows ×
columns; what `sparse-attention` makes of it in each form. Windows see (2·radius + 1)² pixels of a frame in all frames,
in tiles of 8 × 8; drafts have blocks of 8 × 16 and drop 90 % of them. Random weights, float32, batch 1: this measures
time, and nothing here speaks of quality. FreeSwim, arXiv 2511.14712; DraftAttention, arXiv 2505.14708.

ONNX Runtime on {cores} CPU cores ({machine}), shared, one thread; the engines are called in turn, {least} to {most}
times. Milliseconds are medians with p10 … p90, ratios are of the pairs, GMAC of the products inside attention."""
HEADER = "| grid | form | GMAC | ms | faster than dense | turns |"
TAIL = """Masks multiply everything and then hide most of it: slower than dense attention, by what it takes to make
and to apply them. They are what blocks are tested against, and the only form of drafts per head, as released: a GPU
kernel skips blocks there, and an engine of fixed shapes cannot."""
