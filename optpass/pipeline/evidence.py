"""What a freshly lowered engine is measured by: numerics and latency against the original, clips of both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpass.analysis.cost import Totals, measure
from optpass.evaluate.difference import IDENTICAL_DB, program_runner, runners_difference, trial_inputs
from optpass.evaluate.latency import compare_latency
from optpass.evaluate.quality import Evaluator, psnr
from optpass.evaluate.widened import widened
from optpass.ir.program import Program
from optpass.pipeline.recipe import Recipe
from optpass.pipeline.request import Progress, Request
from optpass.pipeline.target import LoweredEntry, Lowering, Runner
from optpass.pipeline.verification import Mode, is_small
from optpass.runtime.module import EngineModule
from optpass.runtime.sampling import GUIDANCE, Samples, can_sample, generate

if TYPE_CHECKING:
    from optpass.report.clips import Clips


@dataclass(frozen=True)
class Evidence:
    """The report's measured sections; ``None`` where a thing was not measured."""

    difference: dict[str, float] | None = None
    latency: dict[str, Any] | None = None
    samples: dict[str, Any] | None = None
    clips: Clips | None = None
    verified: str = "not run"


def collect_evidence(
    recipe: Recipe,
    request: Request,
    original: Program,
    program: Program,
    engines: Mapping[str, LoweredEntry],
    folder: Path,
    progress: Progress,
) -> Evidence:
    """Run the new engine beside the original, which is lowered by the same target into a temporary folder.

    Large models are measured only with ``verify="always"``: what costs more than 0.2 TMAC a call or
    2 GiB of weights would take longer than the build.
    """
    if reason := skipped(request.verify, measure(original).totals):
        return Evidence(verified=f"not run: {reason}")
    entry = program.loop.entry if program.loop else next(iter(program.entries))
    runner = _runner(recipe, engines[entry], folder)
    graph = original.entries[entry]
    trials = trial_inputs(graph, graph.dimensions, original.ranges, request.seed)
    inputs = trials[0]
    progress("compare", 0.0)
    reference = program_runner(widened(original), entry)
    difference = runners_difference(reference, runner, trials).as_dict()
    progress("compare", 1.0)
    if not request.baseline:
        return Evidence(difference, verified="numerics")
    with tempfile.TemporaryDirectory() as temporary:
        progress("lower the original", 0.0)
        lowered = recipe.target.lower(original, Lowering(Path(temporary), allow_nonfinite=request.allow_nonfinite))
        baseline = _runner(recipe, lowered[entry], Path(temporary))
        progress("lower the original", 1.0)
        comparison = compare_latency(
            ("original", baseline),
            ("optimised", runner),
            (inputs, inputs),
            progress=lambda fraction: progress("latency", fraction),
        )
        samples, clips = _samples(request, original, program, entry, (baseline, runner), progress)
    return Evidence(difference, comparison.as_dict(), samples, clips, "numerics")


def skipped(mode: Mode, totals: Totals) -> str:
    """Why no evidence is collected of a model that costs ``totals`` as captured; empty when it is."""
    if mode == "never":
        return "switched off"
    if mode == "auto" and not is_small(totals):
        return "too large to execute here; ask with --verify always"
    return ""


def _runner(recipe: Recipe, engine: LoweredEntry, folder: Path) -> Runner:
    entry = {
        "engine": engine.main,
        "inputs": [spec.as_json() for spec in engine.inputs],
        "outputs": [spec.as_json() for spec in engine.outputs],
        "details": dict(engine.details),
    }
    return type(recipe.target).load(folder, entry, recipe.target.as_options())


def _samples(
    request: Request,
    original: Program,
    program: Program,
    entry: str,
    runners: tuple[Runner, Runner],
    progress: Progress,
) -> tuple[dict[str, Any] | None, Clips | None]:
    folder = original.origin.path if original.origin.pipeline else None
    if folder is None or not request.samples or not can_sample(folder):
        return None, None
    stages = ("samples before", "samples after")
    before, after = (
        _generate(request, folder, _module(program, entry, runner), stage, progress)
        for runner, stage in zip(runners, stages, strict=True)
    )
    from optpass.report.clips import Clips

    labels = tuple(str(int(label)) for label in after.labels)
    record: dict[str, Any] = {
        "labels": list(labels),
        "steps": request.steps,
        "guidance": GUIDANCE,
        "seed": request.seed,
        "psnr": min(psnr(before.frames, after.frames), IDENTICAL_DB),
        "quality_before": None,
        "quality_after": None,
    }
    if (folder / "evaluator").is_dir():
        evaluator = Evaluator.load(folder / "evaluator")
        record["quality_before"] = evaluator.measure(before.frames, before.labels).as_dict()
        record["quality_after"] = evaluator.measure(after.frames, after.labels).as_dict()
    return record, Clips(labels=labels, before=before.frames, after=after.frames)


def _module(program: Program, entry: str, runner: Runner) -> EngineModule:
    graph = program.entries[entry]
    return EngineModule(graph.signature, graph.inputs, graph.outputs, runner, config=program.origin.config)


def _generate(request: Request, folder: Path, module: EngineModule, stage: str, progress: Progress) -> Samples:
    return generate(
        folder,
        module,
        samples=request.samples,
        steps=request.steps,
        seed=request.seed,
        progress=lambda fraction: progress(stage, fraction),
    )
