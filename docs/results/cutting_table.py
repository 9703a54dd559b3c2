"""The table of cuts: every group of every architecture removed alone, against the same channels held at zero."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from optpass.analysis.axes import Axes, axes_of
from optpass.capture.sources import capture
from optpass.ir.program import Program
from optpass.passes.reparameterize import Reparameterize
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SMALL = (
    *("SD 1.5 UNet", "SDXL UNet", "SVD UNet", "DiT-XL/2", "Flux.1", "Wan 2.1 text-to-video 1.3B"),
    *("VAE-KL decoder", "VAE-Wan", "timm ResNet-50", "timm EfficientNet-B0", "timm RepVGG-A0", "MobileViT"),
    *("ConvNeXt V2", "ViT", "Swin", "DETR"),
)
FULL = {"SD 1.5 UNet": "sd15-unet", "SVD UNet": "svd-unet", "Flux.1 transformer": "flux-transformer"}
KINDS = ("conv", "ffn", "heads", "head-dim", "stream", "other")
REASONS = 3
"""How many reasons of fixed axes a row shows, the most frequent ones."""
INTRODUCTION = """# Cutting is zeroing

An **axis** is whatever must be cut at the same indices; a **group** is one that may be cut, with every slice of every
weight that it touches ([how](../pruning.md#axes)). Each group is cut alone, to about half, and then all are at once;
the answer of the smaller Program is compared with that of the original in which the same elements of every value are
held at zero (norms compute their statistics over what is left). Both run in float64, so that a wrong axis cannot hide
behind rounding: the **error** is max|a−b| / max|a|, the worst of all cuts. Cut are those groups of which norms let
anything go: 32 channels in 32 groups cannot shrink. **ms** is the processor time of the first analysis after capture.
Fixed axes are those of weights; the most frequent reasons are shown."""


class Row(NamedTuple):
    """What a Program's analysis gave, and the worst error of its cuts, if they were run."""

    name: str
    nodes: int
    milliseconds: float
    found: Axes
    checked: int | None = None
    error: float | None = None


def cutting() -> str:
    """Both tables: small models with random weights, cut and run; published configurations, analysed."""
    sys.path[:0] = [str(TESTS), str(TESTS / "models")]
    small = [_row(name, program, cuts=True) for name, program in _small()]
    full = [_row(n, capture(TESTS / "configs" / c, structure_only=True), cuts=False) for n, c in FULL.items()]
    parts = [INTRODUCTION, "## Small models, every group", _table(small)]
    return "\n\n".join([*parts, "## Published configurations, structure only", _table(full)])


def _small() -> Iterator[tuple[str, Program]]:
    import cases_diffusers
    import cases_timm
    import cases_transformers
    import zoo

    cases = {case.name: case for case in (*cases_diffusers.CASES, *cases_transformers.CASES, *cases_timm.CASES)}
    for name in SMALL:
        with tempfile.TemporaryDirectory() as folder:
            source, options = zoo.saved(cases[name], zoo.small_model(cases[name]), Path(folder) / "model")
            program = capture(source, inputs=cases[name].inputs, **options)
            yield name, program
            if "RepVGG" in name:
                step = Step("reparameterize", Reparameterize())
                yield f"{name}, reparameterised", run_pass(program, step)[0]


def _row(name: str, program: Program, *, cuts: bool) -> Row:
    start = time.process_time()
    found = axes_of(program)
    groups = found.groups
    milliseconds = 1e3 * (time.process_time() - start)
    row = Row(name, sum(len(graph.calls) for graph in program.entries.values()), milliseconds, found)
    if cuts:
        from axis_oracle import choices, cut_errors

        half = choices(found)
        errors = cut_errors(program, [half, *({index: kept} for index, kept in half.items())])
        row = row._replace(checked=len(half), error=max(errors))
    print(f"{name}: {len(groups)} groups, error {row.error}", file=sys.stderr)
    return row


def _table(rows: list[Row]) -> str:
    cut = any(row.error is not None for row in rows)
    columns = ["model", "nodes", "ms", "groups", *KINDS, *(["cut alone", "error"] if cut else []), "fixed axes"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        kinds = Counter(group.kind for group in row.found.groups)
        cells = [row.name, row.nodes, f"{row.milliseconds:.0f}", len(row.found.groups)]
        cells += [kinds[kind] or "" for kind in KINDS]
        cells += [row.checked, f"{row.error:.0e}"] if cut else []
        lines.append(f"| {' | '.join(map(str, [*cells, _fixed(row.found)]))} |")
    return "\n".join(lines)


def _fixed(found: Axes) -> str:
    counts = Counter(_plain(item.reason) for item in found.fixed)
    shown = [f"{count} × {reason}" for reason, count in counts.most_common(REASONS)]
    rest = len(found.fixed) - sum(count for _, count in counts.most_common(REASONS))
    return "; ".join([*shown, *([f"{rest} × other"] if rest else [])])


def _plain(reason: str) -> str:
    """A reason without its place and its names."""
    reason = re.sub(r" \([^()]*(\(root\))?\)$", "", reason)
    reason = re.sub(r"is a dimension of the (input|output) .*", r"\1s", reason)
    return reason.replace("is a convolution's kernel", "kernels of convolutions")
