"""Clockwork on moving-digits with the feature as it is, and through the adaptor that the recipe which ships trains."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import optpass
from optpass.evaluate.quality import Evaluator, Quality, psnr
from optpass.pipeline.apply import Applied, apply
from optpass.pipeline.recipe import Recipe, find_recipe, load_recipe, make_recipe
from optpass.pipeline.records import machine_text
from optpass.pipeline.request import Request
from optpass.runtime.bundle import read_manifest
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked, Samples, drive

CLIPS, ROUNDS, GUIDANCE = 100, 5, 3.0
CACHE = "cache-features"


@dataclass
class Way:
    """One way to sample: its bundle's pipeline, what it generates, how good that is, and seconds of a clip in turn."""

    label: str
    gmac: float
    trained: float | None
    generate: Callable[[int, int], Samples]
    clips: Samples
    quality: Quality
    seconds: list[float]


def clockwork_digits(checkpoint: Path) -> str:
    """The page, of moving-digits in the folder ``checkpoint``; trains, or finds what was trained before."""
    with tempfile.TemporaryDirectory() as folder:
        ways = [_way(name, recipe, checkpoint, Path(folder)) for name, recipe in _recipes().items()]
        # The first round warms up.
        for number in range(ROUNDS + 1):
            for way in ways:
                started = time.perf_counter()
                way.generate(1, number)
                way.seconds.append(time.perf_counter() - started)
    rows = [_row(way, ways[0]) for way in ways]
    seconds = next(way.trained for way in ways if way.trained)
    head = HEAD.format(clips=CLIPS, guidance=GUIDANCE, rounds=ROUNDS, machine=machine_text(), minutes=seconds / 60)
    return "\n".join([head, f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}", *rows])


def _recipes() -> dict[str, Recipe]:
    """The recipe, and what is left of it without its training and without its cache."""
    whole = load_recipe(find_recipe("clockwork-digits-adaptor"))
    passes = {step.name: dict(step.record.as_options()) for step in whole.steps}
    cached = list(passes).index(CACHE)
    plain = {name: value for name, value in passes[CACHE].items() if name not in ("adaptor", "width")}
    names = list(passes)
    before = [{name: passes[name]} for name in names[:cached]]
    return {
        "every step full": _like(whole, before),
        "reused as it is": _like(whole, [*before, {CACHE: plain}]),
        "through the trained adaptor": whole,
    }


def _like(recipe: Recipe, passes: Sequence[Mapping[str, Any]]) -> Recipe:
    return replace(recipe, steps=make_recipe({"passes": [*passes]}).steps)


def _way(label: str, recipe: Recipe, checkpoint: Path, folder: Path) -> Way:
    out = folder / label.replace(" ", "-")
    made = apply(recipe, Request(str(checkpoint), out, verify="never", baseline=False))
    pipeline = build_pipeline(checkpoint, {"unet": optpass.load(out)})
    asked = Asked(steps=read_manifest(out).usual_steps, guidance=GUIDANCE)

    def generate(samples: int, seed: int) -> Samples:
        return drive(pipeline, samples=samples, asked=asked, seed=seed)

    clips = generate(CLIPS, 0)
    quality = Evaluator.load(checkpoint / "evaluator").measure(clips.frames, clips.labels)
    return Way(label, made.report["ladder"][-1]["total"] / 1e9, _seconds(made), generate, clips, quality, [])


def _seconds(made: Applied) -> float | None:
    """Those of its training."""
    found: float | None = (made.report["passes"][-1].get("training") or {}).get("seconds")
    return found


def _row(way: Way, first: Way) -> str:
    ratios = [one / other for one, other in zip(way.seconds[1:], first.seconds[1:], strict=True)]
    tenths = quantiles(ratios, n=10, method="inclusive")
    same = way is first
    cells = (
        way.label,
        f"{way.gmac:.2f}",
        f"{1000 * median(way.seconds[1:]):.0f}",
        "1" if same else f"{median(ratios):.2f} ({tenths[0]:.2f} … {tenths[-1]:.2f})",
        "" if same else f"{psnr(first.clips.frames, way.clips.frames):.1f}",
        f"{100 * way.quality.frame_accuracy:.1f} %",
        f"{way.quality.frechet_distance:.3f}",
        f"{way.quality.temporal_consistency:.3f}",
    )
    return f"| {' | '.join(cells)} |"


HEAD = """# Clockwork on moving-digits, with a trained adaptor

The recipe `clockwork-digits-adaptor` on the trained [moving-digits](../../tests/checkpoints/moving-digits/README.md):
of 10 sampling steps every third is full, the others take what leaves `up_blocks.1` from the last full one, as it is or
through the residual block of Clockwork, whose {minutes:.1f} minutes of training are on generations of the checkpoint
itself. {clips} clips with guidance {guidance:g}, the same labels and seeds for all; MACs are of a clip's 20
evaluations, without decoding. Times are of whole clips in ONNX Runtime, pipeline included, {rounds} rounds in turn.
{machine}.
"""
COLUMNS = (
    "",
    "GMAC a clip",
    "ms a clip",
    "ratio (p10 … p90)",
    "PSNR to full steps, dB",
    "digits read right",
    "Fréchet distance",
    "consistency",
)
