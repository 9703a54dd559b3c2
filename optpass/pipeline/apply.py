"""The whole way of a checkpoint: capture → passes → lower → evidence → bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optpass import __version__
from optpass.analysis.cost import measure
from optpass.capture.digest import identified
from optpass.capture.precision import precision
from optpass.capture.sources import capture
from optpass.errors import OptpassError, UserError
from optpass.evaluate.scope import Scope
from optpass.ir.program import Program
from optpass.pipeline.evidence import Evidence, collect_evidence
from optpass.pipeline.gates import Gate
from optpass.pipeline.manager import Callback, Event, PassRecord, run_passes
from optpass.pipeline.recipe import Recipe
from optpass.pipeline.records import machine, write_records
from optpass.pipeline.reproducer import Reproducer
from optpass.pipeline.request import Progress, Request
from optpass.pipeline.target import LoweredEntry, Lowering
from optpass.pipeline.verification import Verification
from optpass.runtime.bundle import BundleWriter

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Applied:
    """What :func:`apply` made: the finished folder and its report, as in ``report.json``."""

    folder: Path
    report: Mapping[str, Any]


def apply(
    recipe: Recipe,
    request: Request,
    *,
    callbacks: Sequence[Callback] = (),
    progress: Progress = lambda stage, fraction: None,
) -> Applied:
    """Apply ``recipe`` to a checkpoint and write the bundle, which appears under ``request.out`` only when finished.

    Raises:
        UserError: the recipe, checkpoint, target or output cannot be taken as given.
        GateError: a gate did not hold; the reproducer is kept beside ``out``.
        OptpassError: a pass failed; the message names the reproducer.
    """
    started = time.perf_counter()
    recipe = replace(recipe, dtype=request.dtype or recipe.dtype)
    lowers = not request.structure_only or recipe.target.structure_only
    if lowers:
        type(recipe.target).check_installed(recipe.target_name)
    with BundleWriter(request.out, force=request.force) as writer:
        progress("capture", 0.0)
        original = _capture(recipe, request)
        progress("capture", 1.0)
        if lowers and not recipe.target.structure_only and not original.has_values:
            raise UserError(
                f"{request.checkpoint} has no weights, and target {recipe.target_name!r} needs them; "
                "pass --structure-only to get the report without engines"
            )
        program, records, gates = _run(recipe, request, original, callbacks, progress)
        if lowers:
            writer.reserve(program)
        engines = _lower(recipe, request, program, writer.folder, progress) if lowers else {}
        evidence = (
            collect_evidence(recipe, request, original, program, engines, writer.folder, progress)
            if engines and type(recipe.target).runs_here and program.has_values
            else Evidence()
        )
        report = _report(recipe, original, program, records, gates, engines, evidence)
        report["command"] = request.command
        report["structure_only"] = not program.has_values
        report["seconds"] = time.perf_counter() - started
        progress("write", 0.0)
        write_records(writer.folder, recipe, report, evidence.clips)
        writer.finish(program=program, target=recipe.target_name, options=recipe.target.as_options(), engines=engines)
        progress("write", 1.0)
    return Applied(request.out, report)


def captured(recipe: Recipe, request: Request) -> Program:
    """The checkpoint as ``recipe`` wants it, its weights lazy; no value is read.

    Raises:
        UserError: it cannot be captured.
    """
    return capture(
        request.checkpoint,
        inputs={**recipe.inputs, **request.inputs},
        structure_only=request.structure_only,
        weights=request.weights,
        component=request.component,
        trust_remote_code=request.trust_remote_code,
        dtype=precision(recipe.dtype),
        floats=type(recipe.target).floats,
    )


def _capture(recipe: Recipe, request: Request) -> Program:
    return identified(captured(recipe, request))


def _run(
    recipe: Recipe, request: Request, original: Program, callbacks: Sequence[Callback], progress: Progress
) -> tuple[Program, list[PassRecord], list[dict[str, Any]]]:
    gates = GateKeeper(recipe.gates, progress)
    folder = request.out.with_name(f"{request.out.name}.reproducer")
    reproducer = Reproducer(folder, gates=[gate.as_document() for gate in recipe.gates])
    try:
        program, records = run_passes(
            original, recipe.steps, [Verification(request.verify, request.seed), gates, *callbacks, reproducer]
        )
    except UserError:
        raise
    except OptpassError as error:
        error.reproducer = reproducer.written
        raise
    return program, records, gates.records


class GateKeeper:
    """Callback that checks the recipe's gates after the pass that each names."""

    def __init__(self, gates: Sequence[Gate], progress: Progress) -> None:
        self.gates = gates
        self.progress = progress
        self.records: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """
        Raises:
            GateError: a bound does not hold.
        """
        if event.kind != "finished" or event.after is None:
            return
        for gate in self.gates:
            if gate.after == event.step.name:
                self.records.append(gate.check(Scope(event.original, event.after, self.progress)))


def _lower(
    recipe: Recipe, request: Request, program: Program, folder: Path, progress: Progress
) -> dict[str, LoweredEntry]:
    if unsupported := recipe.target.supports(program):
        shown = "\n  ".join(f"{item.path}: {item.operator}: {item.reason}" for item in unsupported[:10])
        raise UserError(f"target {recipe.target_name!r} cannot take {len(unsupported)} operators:\n  {shown}")
    lowering = Lowering(folder, allow_nonfinite=request.allow_nonfinite, progress=progress)
    return recipe.target.lower(program, lowering)


def _report(
    recipe: Recipe,
    original: Program,
    program: Program,
    records: Sequence[PassRecord],
    gates: list[dict[str, Any]],
    engines: Mapping[str, LoweredEntry],
    evidence: Evidence,
) -> dict[str, Any]:
    origin = original.origin.as_json()
    return {
        "schema_version": REPORT_SCHEMA,
        "optpass": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe.as_document(),
        "checkpoint": {key: origin[key] for key in ("name", "kind", "class", "component", "sha256", "pipeline")},
        "inputs": {spec.name: list(spec.shape) for graph in original.entries.values() for spec in graph.inputs},
        "dimensions": [item.as_json() for graph in original.entries.values() for item in graph.dimensions],
        "before": (records[0].before if records else measure(original)).as_json(),
        "after": (records[-1].after if records else measure(program)).as_json(),
        "passes": [record.as_json() for record in records],
        "gates": gates,
        "target": {"name": recipe.target_name, "options": recipe.target.as_options(), "verified": evidence.verified},
        "engines": [_engine(name, engine) for name, engine in engines.items()],
        "engine_difference": evidence.difference,
        "latency": evidence.latency,
        "samples": evidence.samples,
        "machine": machine(),
    }


def _engine(entry: str, engine: LoweredEntry) -> dict[str, Any]:
    details = dict(engine.details)
    return {
        "entry": entry,
        "file": engine.main,
        "bytes": details.pop("bytes", None),
        "nodes": details.pop("nodes", None),
        "details": details,
    }
