"""What a freshly lowered engine is measured by: numerics and latency against the original, clips of both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optpass.analysis.cost import Totals, measure
from optpass.evaluate.difference import EQUAL, IDENTICAL_DB, program_runner, runners_difference, trial_inputs
from optpass.evaluate.latency import compare_latency
from optpass.evaluate.quality import Evaluator, psnr
from optpass.evaluate.widened import widened
from optpass.ir.program import Program
from optpass.pipeline.request import Progress, Request
from optpass.pipeline.target import LoweredEntry, Lowering, Runner, Target
from optpass.pipeline.verification import Mode, is_small
from optpass.runtime.module import EngineModule, component_of, engine_module
from optpass.runtime.sampling import GUIDANCE, Asked, Samples, can_sample, generate

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


@dataclass(frozen=True)
class Subject:
    """A lowered Program: ``engines``, which lie in ``folder``, of ``program``, to be compared with ``original``."""

    target: Target
    original: Program
    program: Program
    engines: Mapping[str, LoweredEntry]
    folder: Path
    progress: Progress

    @property
    def entries(self) -> list[str]:
        """The entries to run: a loop's own, or all."""
        return [self.program.loop.entry] if self.program.loop else list(self.program.entries)

    def runners(
        self, engines: Mapping[str, LoweredEntry] | None = None, folder: Path | None = None
    ) -> dict[str, Runner]:
        """The engines (or others of the same Program in ``folder``), loaded."""
        return {
            name: _runner(self.target, (engines or self.engines)[name], folder or self.folder) for name in self.entries
        }


Runners = dict[str, Runner]
"""The loaded engines of one Program, by entry."""


def collect_evidence(subjects: Sequence[Subject], request: Request, progress: Progress) -> list[Evidence]:
    """Run new engines beside the original ones, which are lowered by the same targets into a temporary folder.

    Large models are measured only with ``verify="always"``: what costs more than 0.2 TMAC a call or
    2 GiB of weights would take longer than the build. Samples, made with all subjects in their pipeline, are
    in the first one's evidence.
    """
    found: list[Evidence] = []
    pairs: dict[int, tuple[Runners, Runners]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for index, subject in enumerate(subjects):
            if reason := skipped(request.verify, measure(subject.original).totals):
                found.append(Evidence(verified=f"not run: {reason}"))
                continue
            after = subject.runners()
            difference = _difference(subject, after, request)
            if not request.baseline:
                found.append(Evidence(difference, verified="numerics"))
                continue
            before = _lowered_original(subject, request, Path(temporary, str(index)))
            latency = _latency(subject, (before, after), request)
            found.append(Evidence(difference, latency, verified="numerics"))
            pairs[index] = before, after
        if pairs and len(pairs) == len(subjects):
            samples, clips = _samples(request, subjects, list(pairs.values()), progress)
            found[0] = replace(found[0], samples=samples, clips=clips)
    return found


def skipped(mode: Mode, totals: Totals) -> str:
    """Why no evidence is collected of a model that costs ``totals`` as captured; empty when it is."""
    if mode == "never":
        return "switched off"
    if mode == "auto" and not is_small(totals):
        return "too large to execute here; ask with --verify always"
    return ""


def _difference(subject: Subject, after: Runners, request: Request) -> dict[str, float]:
    subject.progress("compare", 0.0)
    worst, original = EQUAL, widened(subject.original)
    for name, runner in after.items():
        reference = program_runner(original, name)
        worst = worst.worst(runners_difference(reference, runner, _trials(subject, name, request)))
    subject.progress("compare", 1.0)
    return worst.as_dict()


def _trials(subject: Subject, entry: str, request: Request) -> list[dict[str, Tensor]]:
    """Random inputs, at the sizes that were captured first, then at others that the entry takes."""
    graph = subject.original.entries[entry]
    return trial_inputs(graph, graph.dimensions, subject.original.ranges, request.seed)


def _lowered_original(subject: Subject, request: Request, folder: Path) -> Runners:
    subject.progress("lower the original", 0.0)
    folder.mkdir()
    engines = subject.target.lower(subject.original, Lowering(folder, allow_nonfinite=request.allow_nonfinite))
    runners = subject.runners(engines, folder)
    subject.progress("lower the original", 1.0)
    return runners


def _latency(subject: Subject, pair: tuple[Runners, Runners], request: Request) -> dict[str, Any]:
    """Of the first entry."""
    entry = subject.entries[0]
    inputs = _trials(subject, entry, request)[0]
    return compare_latency(
        ("original", pair[0][entry]),
        ("optimised", pair[1][entry]),
        (inputs, inputs),
        progress=lambda fraction: subject.progress("latency", fraction),
    ).as_dict()


def _runner(target: Target, engine: LoweredEntry, folder: Path) -> Runner:
    entry = {
        "engine": engine.main,
        "inputs": [spec.as_json() for spec in engine.inputs],
        "outputs": [spec.as_json() for spec in engine.outputs],
        "details": dict(engine.details),
    }
    return type(target).load(folder, entry, target.as_options())


def _samples(
    request: Request, subjects: Sequence[Subject], pairs: Sequence[tuple[Runners, Runners]], progress: Progress
) -> tuple[dict[str, Any] | None, Clips | None]:
    origin = subjects[0].original.origin
    folder = origin.path if origin.pipeline else None
    if folder is None or not request.samples or not can_sample(folder):
        return None, None
    stages = ("samples before", "samples after")
    made: list[Samples] = []
    for side, stage in enumerate(stages):
        replaced = {
            subject.program.origin.component: _module(subject, pair[side])
            for subject, pair in zip(subjects, pairs, strict=True)
        }
        made.append(_generate(request, folder, replaced, stage, progress))
    before, after = made
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


def _module(subject: Subject, runners: Runners) -> EngineModule:
    return component_of({name: engine_module(subject.program, name, runner) for name, runner in runners.items()})


def _generate(
    request: Request, folder: Path, replaced: Mapping[str, EngineModule], stage: str, progress: Progress
) -> Samples:
    return generate(
        folder,
        replaced,
        samples=request.samples,
        asked=Asked(steps=request.steps, guidance=GUIDANCE),
        seed=request.seed,
        progress=lambda fraction: progress(stage, fraction),
    )
