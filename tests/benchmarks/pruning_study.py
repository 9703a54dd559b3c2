"""Quality, time and MACs of moving-digits after structural passes, before healing: clips in turn, at equal seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pruning_models import CHECKPOINT, engine
from torch import Tensor

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.evaluate.latency import compare_latency
from optpass.evaluate.quality import Evaluator, psnr
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program
from optpass.pipeline.manager import PassRecord, run_passes
from optpass.pipeline.recipe import make_recipe
from optpass.report.scatter import Plot, plot_of
from optpass.runtime.class_to_video import ClassToVideoPipeline
from optpass.runtime.looped import engine_module
from optpass.runtime.module import EngineModule

INPUTS = {"sample": [2, 8, 4, 16, 16]}
STEPS, CLIPS, TIMED = 20, 20, 20
EXACT = ["single-token-attention"]
SERIES: Mapping[str, list[tuple[str, dict[str, Any]]]] = {
    "prune-channels, l2": [
        (f"MACs {share}", {"prune-channels": {"macs": share}}) for share in (0.95, 0.9, 0.8, 0.65, 0.5)
    ],
    "prune-channels, taylor": [
        (f"MACs {share}", {"prune-channels": {"macs": share, "criterion": "taylor", "trials": 8}})
        for share in (0.95, 0.9, 0.8, 0.65, 0.5)
    ],
    "funnel-channels, attention": [
        (f"ratio {ratio}", {"funnel-channels": {"ratio": ratio}}) for ratio in (0.75, 0.5, 0.25, 0.125)
    ],
    "funnel-channels, convolutions": [
        (f"ratio {ratio}", {"funnel-channels": {"ratio": ratio, "scope": ["conv"]}}) for ratio in (0.75, 0.5)
    ],
}
REMOVED = (1, 2, 4, 8, 16)
"""Blocks that go, by ``prune-blocks``, the least important first."""


@dataclass
class Way:
    """One pass with its options: the Program, its engine, and the clips that it made."""

    series: str
    label: str
    program: Program
    engine: EngineModule
    clips: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """What one way gave; ``macs``, ``parameters`` and ``time`` (of one call) are shares of the original's."""

    series: str
    label: str
    macs: float
    parameters: float
    time: float
    psnr: float
    accuracy: float
    distance: float


def study(folder: Path, clips: int = CLIPS, steps: int = STEPS) -> list[Row]:
    """A row for the exact passes alone, and for each of :data:`SERIES` after them."""
    everyone = list(_ways(folder))
    evaluator = Evaluator.load(CHECKPOINT / "evaluator")
    for index in range(clips):
        for way in everyone:
            pipeline = ClassToVideoPipeline.load(CHECKPOINT, unet=way.engine)
            pipeline.set_progress_bar_config(disable=True)
            way.clips.append(pipeline([index % 10], num_inference_steps=steps, seed=index).frames)
        print(f"moving-digits: {index + 1} of {clips} clips", file=sys.stderr, flush=True)
    return [_row(way, everyone[0], evaluator) for way in everyone]


def _ways(folder: Path) -> Iterator[Way]:
    original = capture(CHECKPOINT, inputs=INPUTS, dtype=torch.float32)
    ranking = _ranked_blocks(original)
    blocks = [(f"{count} removed", {"prune-blocks": {"remove": ranking[:count]}}) for count in REMOVED]
    yield _way("original", "", original, [], folder / "original")
    for series, variants in {**SERIES, "prune-blocks": blocks}.items():
        for label, record in variants:
            print(f"moving-digits: {series}, {label}", file=sys.stderr, flush=True)
            yield _way(series, label, original, [record], folder / f"{series} {label}".replace(" ", "-"))


def _ranked_blocks(original: Program) -> list[str]:
    """The paths of the blocks, the one first whose removal costs least; measured once for all numbers of them."""
    _, records = _passed(original, [{"prune-blocks": {"count": max(REMOVED)}}])
    blocks = records[-1].facts["blocks"]
    return [block["path"] for block in sorted(blocks, key=lambda block: block["importance"])]


def _passed(original: Program, passes: Sequence[Any]) -> tuple[Program, list[PassRecord]]:
    recipe = make_recipe({"passes": [*EXACT, *passes], "target": "program", "unhealed": True})
    return run_passes(original, recipe.steps)


def _way(series: str, label: str, original: Program, passes: Sequence[Any], out: Path) -> Way:
    program, _ = _passed(original, passes)
    return Way(series, label, program, engine_module(program, {"full": engine(program, out)}))


def _row(way: Way, reference: Way, evaluator: Evaluator) -> Row:
    before, after = (measure(each.program).totals for each in (reference, way))
    call = random_inputs(way.program.entries["full"].inputs_at(), way.program.ranges, seed=0)
    engines = (("original", reference.engine.runner), (way.label, way.engine.runner))
    latency = compare_latency(*engines, [call], runs=TIMED)
    frames, plain = torch.cat(way.clips), torch.cat(reference.clips)
    quality = evaluator.measure(frames, torch.arange(len(way.clips)) % 10)
    return Row(
        *(way.series, way.label),
        macs=after.macs / before.macs,
        parameters=after.parameters / before.parameters,
        time=latency.ratio.median,
        psnr=psnr(plain, frames),
        accuracy=quality.frame_accuracy,
        distance=quality.frechet_distance,
    )


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """What a report takes under ``plots``: PSNR, frame accuracy and time against MACs."""
    figures = {"psnr": "PSNR against the original, dB", "accuracy": "frames read right", "time": "time of a call"}
    names = [name for name in dict.fromkeys(row.series for row in rows) if name != "original"]
    whole = [row for row in rows if row.series == "original"]

    def points(name: str, figure: str) -> list[list[Any]]:
        # Every series begins at the original, whose PSNR is infinite.
        start = whole if figure != "psnr" else []
        return [
            [row.macs, getattr(row, figure), row.label or row.series]
            for row in (*start, *(row for row in rows if row.series == name))
        ]

    return {
        "plots": [
            {
                "title": f"moving-digits before healing: {title}",
                "x": "share of MACs",
                "y": title,
                "series": [{"name": name, "points": points(name, figure)} for name in names],
            }
            for figure, title in figures.items()
        ]
    }


def plots(rows: Sequence[Row]) -> list[Plot]:
    """The plots of :func:`record`."""
    made = (plot_of(f"plot-{index}", each) for index, each in enumerate(record(rows)["plots"]))
    return [plot for plot in made if plot is not None]


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    head = ("", "MACs", "parameters", "time of a call", "PSNR, dB", "frames read right", "Fréchet distance")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        name = f"{row.series}, {row.label}" if row.label else row.series
        shares = f"{row.macs:.3f} | {row.parameters:.3f} | {row.time:.2f}"
        lines.append(f"| {name} | {shares} | {row.psnr:.1f} | {row.accuracy:.3f} | {row.distance:.2f} |")
    return lines
