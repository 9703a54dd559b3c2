"""What a freshly lowered engine is measured by: numerics and latency against the original, clips of both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpass.analysis.cost import Totals, measure
from optpass.evaluate.difference import EQUAL, IDENTICAL_DB, program_calls, program_runners, runners_difference
from optpass.evaluate.latency import compare_latency
from optpass.evaluate.quality import Evaluator, psnr
from optpass.evaluate.walks import call_trials, timed_calls
from optpass.evaluate.widened import widened
from optpass.ir.program import Program
from optpass.pipeline.lowered import runners_of
from optpass.pipeline.progress import Progress
from optpass.pipeline.request import Request
from optpass.pipeline.target import LoweredEntry, Lowering, Runner, Target
from optpass.pipeline.verification import Mode, is_small
from optpass.runtime.loop import call_runners
from optpass.runtime.looped import engine_module
from optpass.runtime.module import EngineModule
from optpass.runtime.sampling import Asked, Samples, asked_beside, can_sample, generate

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
    """A lowered Program: ``engines``, which lie in ``folder``, of ``program``, to be compared with ``original``.

    ``untouched`` says that the latter has the checkpoint's own weights: nothing was put into them.
    """

    target: Target
    original: Program
    program: Program
    engines: Mapping[str, LoweredEntry]
    folder: Path
    progress: Progress
    untouched: bool = True

    def runners(self) -> Runners:
        """The engines, loaded."""
        return runners_of(self.target, self.engines, self.folder)


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
            if subject.target.runs() == "emulated":
                found.append(Evidence(difference, verified="numerics, in an emulator"))
                continue
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
    worst, original, loop = EQUAL, widened(subject.original), subject.program.loop
    references = call_runners(original, program_runners(original))
    for name, runner in call_runners(subject.program, after).items():
        trials = call_trials(program_calls(subject.original)[name], original.ranges, request.seed, loop=loop)
        worst = worst.worst(runners_difference(references[name], runner, trials))
    subject.progress("compare", 1.0)
    return worst.as_dict()


def _lowered_original(subject: Subject, request: Request, folder: Path) -> Runners:
    subject.progress("lower the original", 0.0)
    folder.mkdir()
    engines = subject.target.lower(subject.original, Lowering(folder, allow_nonfinite=request.allow_nonfinite))
    runners = replace(subject, engines=engines, folder=folder).runners()
    subject.progress("lower the original", 1.0)
    return runners


def _latency(subject: Subject, pair: tuple[Runners, Runners], request: Request) -> dict[str, Any]:
    """Of the first call; of a loop, over a period of its schedule."""
    before, after = call_runners(subject.original, pair[0]), call_runners(subject.program, pair[1])
    name, call = next(iter(program_calls(subject.original).items()))
    return compare_latency(
        ("original", before[name]),
        ("optimised", after[name]),
        timed_calls(call, subject.original.ranges, request.seed, loop=subject.program.loop),
        progress=lambda fraction: subject.progress("latency", fraction),
    ).as_dict()


def _samples(
    request: Request, subjects: Sequence[Subject], pairs: Sequence[tuple[Runners, Runners]], progress: Progress
) -> tuple[dict[str, Any] | None, Clips | None]:
    origin = subjects[0].original.origin
    folder = origin.path if origin.pipeline else None
    if folder is None or not request.samples or not can_sample(folder):
        return None, None
    driven = next((subject for subject in subjects if subject.program.loop), subjects[0])
    asked = asked_beside(driven.original.loop, driven.program.loop, request.steps)
    # An engine has one batch, and guidance takes another: the original is then sampled as the folder has it.
    loaded = driven if asked[0].guidance != asked[1].guidance else None
    if loaded and not loaded.untouched:
        return None, None
    made: list[Samples] = []
    for side, stage in enumerate(("samples before", "samples after")):
        replaced = {
            subject.program.origin.component: engine_module((subject.original, subject.program)[side], pair[side])
            for subject, pair in zip(subjects, pairs, strict=True)
            if side or subject is not loaded
        }
        made.append(_generate(request, asked[side], folder, replaced, stage, progress))
    from optpass.report.clips import Clips

    before, after = made
    labels = tuple(str(int(label)) for label in after.labels)
    clips = Clips(labels=labels, before=before.frames, after=after.frames)
    return _compared(before, after, asked, request.seed, folder), clips


def _compared(before: Samples, after: Samples, asked: tuple[Asked, Asked], seed: int, folder: Path) -> dict[str, Any]:
    """The report's section: how samples were made, how near they are, and what the folder's evaluator says of them."""
    record: dict[str, Any] = {
        "labels": [str(int(label)) for label in after.labels],
        "steps": asked[1].steps,
        "guidance": asked[1].guidance,
        "steps_before": asked[0].steps,
        "guidance_before": asked[0].guidance,
        "seed": seed,
        "psnr": min(psnr(before.frames, after.frames), IDENTICAL_DB),
        "quality_before": None,
        "quality_after": None,
    }
    if (folder / "evaluator").is_dir():
        evaluator = Evaluator.load(folder / "evaluator")
        record["quality_before"] = evaluator.measure(before.frames, before.labels).as_dict()
        record["quality_after"] = evaluator.measure(after.frames, after.labels).as_dict()
    return record


def _generate(
    request: Request, asked: Asked, folder: Path, replaced: Mapping[str, EngineModule], stage: str, progress: Progress
) -> Samples:
    return generate(
        folder,
        replaced,
        samples=request.samples,
        asked=asked,
        seed=request.seed,
        progress=lambda fraction: progress(stage, fraction),
    )
