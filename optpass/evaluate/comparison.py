"""``optpass compare``: a bundle beside another one, or beside the checkpoint it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.capture.sources import capture
from optpass.capture.spans import Sizes, Span
from optpass.errors import UserError
from optpass.evaluate.difference import IDENTICAL_DB, runners_difference
from optpass.evaluate.latency import compare_latency
from optpass.evaluate.quality import Evaluator, psnr
from optpass.evaluate.walks import call_trials, period, timed_calls
from optpass.ir.interface import Interface
from optpass.ir.loop import Cycle, Loop
from optpass.ir.program import InputRange
from optpass.runtime.bundle import MANIFEST, STEPS, read_manifest
from optpass.runtime.loading import load
from optpass.runtime.looped import LoopModule, program_module
from optpass.runtime.module import EngineModule
from optpass.runtime.sampling import asked_beside, can_sample, generate


@dataclass(frozen=True)
class Side:
    """One of the two models: how to call it, the pipeline folder it samples in, what it replaces there, its loop."""

    label: str
    module: EngineModule
    folder: Path | None
    replaced: Mapping[str, EngineModule]
    loop: Loop | None


def compare(
    reference: str,
    bundle: Path,
    *,
    samples: int = 10,
    steps: int | None = None,
    runs: int = 20,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> dict[str, Any]:
    """Numeric difference on random inputs, latency in alternating calls, samples at equal seeds.

    ``steps`` are those of the samples of both; by default each is sampled as it is made for, and where a schedule
    serves one number of steps, both in so many.

    Raises:
        UserError: a side cannot be loaded, or the two take or return different tensors.
    """
    progress("load", 0.0)
    after = _bundle_side(bundle)
    before = _reference_side(reference, after.module)
    progress("load", 1.0)
    _check_interfaces(before, after)
    manifest = read_manifest(bundle)
    trials, calls = _trials(before.module, after.module, manifest.input_ranges(), seed)
    difference = runners_difference(before.module.runner, after.module.runner, trials)
    latency = compare_latency(
        (before.label, before.module.runner),
        (after.label, after.module.runner),
        calls,
        runs=runs,
        progress=lambda fraction: progress("latency", fraction),
    )
    return {
        "reference": reference,
        "bundle": str(bundle),
        "difference": difference.as_dict(),
        "latency": latency.as_dict(),
        "samples": _compare_samples(before, after, samples, steps, seed, progress),
    }


def _trials(
    before: EngineModule, after: EngineModule, ranges: Mapping[str, InputRange], seed: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Calls to compare the answers of, and calls to time: for modules with a schedule, whole walks through it."""
    looped = [module for module in (after, before) if isinstance(module, LoopModule)]
    for module in looped:
        if module.runner.uncounted:
            module.steps = period(module.runner.loop)
    loops = [module.runner.loop for module in looped]
    # A schedule of so many steps takes fewer, and no more.
    counted = [loop for loop in loops if not isinstance(loop.schedule, Cycle) and loop.schedule.of is not None]
    loop = min(counted, key=period) if counted else next(iter(loops), None)
    call = Interface(after.inputs, after.outputs, after.dimensions)
    return call_trials(call, ranges, seed, loop=loop), timed_calls(call, ranges, seed, loop=loop)


def _bundle_side(folder: Path) -> Side:
    manifest = read_manifest(folder)
    module = load(folder)
    replaced = {manifest.component: module}
    for part in manifest.parts:
        replaced[part.component] = load(folder, component=part.component, verify=False)
    carried = folder / manifest.components if manifest.components else None
    return Side(folder.name, module, carried, replaced, manifest.driven())


def _reference_side(reference: str, other: EngineModule) -> Side:
    path = Path(reference)
    if (path / MANIFEST).is_file():
        return _bundle_side(path)
    program = capture(reference, inputs=_sizes(other), dtype=torch.float32)
    if not program.has_values:
        raise UserError(f"{reference} has no weights to compare with")
    module = program_module(program)
    folder = program.origin.path if program.origin.pipeline else None
    return Side(f"{path.name} (PyTorch)", module, folder, {program.origin.component: module}, program.loop)


def _sizes(module: EngineModule) -> Sizes:
    """The sizes of a module's inputs, as a capture is asked for them."""
    spans = {item.name: Span(item.minimum, item.maximum, item.step) for item in module.dimensions}
    return {
        spec.name: tuple(size if isinstance(size, int) else spans[size] for size in spec.shape)
        for spec in module.inputs
    }


def _check_interfaces(before: Side, after: Side) -> None:
    for kind in ("inputs", "outputs"):
        ours = {spec.name: spec.shape for spec in getattr(before.module, kind)}
        theirs = {spec.name: spec.shape for spec in getattr(after.module, kind)}
        if ours != theirs:
            raise UserError(f"{before.label} and {after.label} have different {kind}: {ours} and {theirs}")


def _compare_samples(
    before: Side, after: Side, samples: int, steps: int | None, seed: int, progress: Callable[[str, float], None]
) -> dict[str, Any] | None:
    if not samples or not can_sample(after.folder) or before.folder is None or after.folder is None:
        return None
    asked = asked_beside(before.loop, after.loop, STEPS)
    if steps is not None:
        asked = replace(asked[0], steps=steps), replace(asked[1], steps=steps)
    made = [
        generate(
            side.folder or after.folder,
            side.replaced,
            samples=samples,
            asked=how,
            seed=seed,
            progress=lambda fraction, side=side: progress(f"samples of {side.label}", fraction),  # type: ignore[misc]
        )
        for side, how in zip((before, after), asked, strict=True)
    ]
    record: dict[str, Any] = {
        "samples": samples,
        "steps": asked[1].steps,
        "guidance": asked[1].guidance,
        "steps_before": asked[0].steps,
        "guidance_before": asked[0].guidance,
        "seed": seed,
        "psnr": min(psnr(made[0].frames, made[1].frames), IDENTICAL_DB),
    }
    evaluator = Evaluator.load(after.folder / "evaluator")
    for key, item in zip(("quality_before", "quality_after"), made, strict=True):
        record[key] = evaluator.measure(item.frames, item.labels).as_dict()
    return record
