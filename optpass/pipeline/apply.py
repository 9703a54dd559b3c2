"""The whole way of a checkpoint: capture → passes → lower → evidence → bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from optpass import __version__
from optpass.analysis.cost import measure
from optpass.capture.configs import DENOISERS
from optpass.capture.digest import identified
from optpass.capture.precision import precision
from optpass.capture.sources import capture, capture_pipeline
from optpass.capture.spans import Sizes
from optpass.errors import OptpassError, UserError, nearest
from optpass.ir.program import Program
from optpass.pipeline.evidence import Evidence, Subject, collect_evidence
from optpass.pipeline.gatekeeper import GateKeeper
from optpass.pipeline.ladder import Climb, ladder
from optpass.pipeline.loop_record import loop_record
from optpass.pipeline.manager import Callback, Event, PassRecord, run_passes
from optpass.pipeline.progress import Progress
from optpass.pipeline.recipe import OTHERS, Recipe, Step, check_legality, refuse_gates, unhealed
from optpass.pipeline.records import machine, write_records
from optpass.pipeline.reproducer import Reproducer
from optpass.pipeline.request import Request
from optpass.pipeline.target import LoweredEntry, Lowering
from optpass.pipeline.verification import Verification
from optpass.runtime.bundle import BundleWriter, PartRecord, Verified, engine_digests, part_record
from optpass.runtime.folder import neural_components
from optpass.runtime.slot_records import write_slots

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Applied:
    """What :func:`apply` made: the finished folder and its report, as in ``report.json``."""

    folder: Path
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One model on its way: a checkpoint's only one, or a component of a pipeline.

    ``recipe`` is the recipe as it stands for this model alone, ``place`` where its engines lie, relative to
    the bundle, ``reference`` what the result is compared with: ``original``, with what ``added`` passes put in.
    """

    recipe: Recipe
    original: Program
    program: Program
    reference: Program
    records: Sequence[PassRecord] = ()
    gates: Sequence[Mapping[str, Any]] = ()
    added: Sequence[str] = ()
    place: str = "."
    engines: Mapping[str, LoweredEntry] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def component(self) -> str:
        return self.original.origin.component

    @property
    def kept_steps(self) -> tuple[Step, ...]:
        """The passes that made ``program``, with the options that they settled."""
        return tuple(Step(record.name, record.record) for record in self.records if not record.withdrawn)


def apply(
    recipe: Recipe,
    request: Request,
    *,
    callbacks: Sequence[Callback] = (),
    progress: Progress = lambda stage, fraction: None,
) -> Applied:
    """Apply ``recipe`` to a checkpoint and write the bundle, which appears under ``request.out`` only when finished.

    A recipe with ``components`` is applied to each component of a pipeline that it lowers, one after another.

    Raises:
        UserError: the recipe, checkpoint, target or output cannot be taken as given.
        GateError: a gate did not hold; the reproducer is kept beside ``out``.
        OptpassError: a pass failed; the message names the reproducer.
    """
    started = time.perf_counter()
    recipe = as_asked(recipe, request)
    if not request.structure_only:
        check_legality(recipe)
    with BundleWriter(request.out, force=request.force) as writer:
        _check_target(recipe, request)
        progress("capture", 0.0)
        parts = _capture(recipe, request)
        progress("capture", 1.0)
        parts = [_run(part, request, callbacks, _named(part, parts, progress)) for part in parts]
        main, *others = parts
        if _lowers(main.recipe, request):
            writer.reserve(*(part.program for part in parts))
            parts = [_lower(part, request, writer.folder, _named(part, parts, progress)) for part in parts]
            main, *others = parts = _measured(parts, request, writer.folder, progress)
        recipe = _settled(recipe, parts)
        report = _report(recipe, parts, request)
        report["command"] = request.command
        report["structure_only"] = not main.program.has_values
        report["seconds"] = time.perf_counter() - started
        progress("write", 0.0)
        write_records(writer.folder, recipe, report, main.evidence.clips)
        writer.finish(
            program=main.program,
            target=main.recipe.target_name,
            options=main.recipe.target.as_options(),
            engines=main.engines,
            folder=main.place,
            parts=[_record(part) for part in others],
            call=recipe.call,
            verified=_verified(main),
            digests={
                name: digest for part in others for name, digest in engine_digests(part.engines, part.place).items()
            },
        )
        progress("write", 1.0)
    return Applied(request.out, report)


def as_asked(recipe: Recipe, request: Request) -> Recipe:
    """``recipe`` with what ``request`` says in its place, so that the lock file says it too."""
    # Of a recipe for several components, who the inputs are meant for is known once they are captured.
    inputs = recipe.inputs if recipe.components is not None else {**recipe.inputs, **request.inputs}
    dtype, accepted = request.dtype or recipe.dtype, request.unhealed or recipe.unhealed
    return replace(recipe, inputs=inputs, dtype=dtype, unhealed=accepted)


def _lowers(recipe: Recipe, request: Request) -> bool:
    return not request.structure_only or recipe.target.structure_only


def _check_target(recipe: Recipe, request: Request) -> None:
    sections = [section for section in (recipe.components or {}).values() if section and section.target]
    named = [(recipe.target_name, recipe.target), *((each.target_name, each.target) for each in sections)]
    for name, target in named:
        if target is not None and (not request.structure_only or target.structure_only):
            type(target).check_installed(name)
            target.check_machine()


def _named(part: Part, parts: Sequence[Part], progress: Progress) -> Progress:
    """``progress`` with the component's name before the stage, where there are several."""
    if len(parts) == 1:
        return progress
    return lambda stage, fraction: progress(f"{part.component}: {stage}", fraction)


def _capture(recipe: Recipe, request: Request) -> list[Part]:
    """As :func:`captured_parts`, each with its checkpoint's identity."""
    parts = [_identified(part) for part in captured_parts(recipe, request)]
    for part in parts:
        lowers = _lowers(part.recipe, request) and not part.recipe.target.structure_only
        if lowers and not part.original.has_values:
            what = f"{request.checkpoint}{f' ({part.component})' if len(parts) > 1 else ''}"
            raise UserError(
                f"{what} has no weights, and target {part.recipe.target_name!r} needs them; "
                "pass --structure-only to get the report without engines"
            )
    return parts


def captured_parts(recipe: Recipe, request: Request) -> list[Part]:
    """The models that the recipe is about, as captured, the denoiser first; no value is read.

    Raises:
        UserError: one cannot be captured.
    """
    return _capture_components(recipe, request) if recipe.components is not None else _capture_one(recipe, request)


def _identified(part: Part) -> Part:
    program = identified(part.original)
    return replace(part, original=program, program=program, reference=program)


def _capture_one(recipe: Recipe, request: Request) -> list[Part]:
    program = capture(
        request.checkpoint,
        inputs={**recipe.inputs, **request.inputs},
        structure_only=request.structure_only,
        weights=request.weights,
        component=request.component,
        trust_remote_code=request.trust_remote_code,
        dtype=precision(recipe.dtype),
        floats=type(recipe.target).floats,
    )
    return [Part(recipe, program, program, program)]


def _capture_components(recipe: Recipe, request: Request) -> list[Part]:
    if request.weights is not None:
        raise UserError("--weights names one file, and the recipe's 'components' have weights each in its own folder")

    def recipe_of(name: str) -> Recipe | None:
        if request.component not in (None, name):
            return None
        return recipe.of_component(name, denoises=name in DENOISERS)

    def wanted(name: str) -> Sizes | None:
        own = recipe_of(name)
        given = request.inputs if name == request.component or name in DENOISERS else {}
        return None if own is None else {**own.inputs, **given}

    programs = capture_pipeline(
        request.checkpoint,
        wanted,
        call=recipe.call,
        structure_only=request.structure_only,
        trust_remote_code=request.trust_remote_code,
        dtype=precision(recipe.dtype),
        floats=type(recipe.target).floats,
    )
    named = {name for name, section in (recipe.components or {}).items() if section and name != OTHERS}
    asked = named if request.component is None else {request.component}
    for name in sorted(asked - set(programs)):
        raise UserError(
            f"{request.checkpoint}: the pipeline's call runs no model {name!r} that the recipe lowers"
            f"{nearest(name, neural_components(Path(request.checkpoint)))}"
        )
    if not programs:
        raise UserError(f"the recipe keeps every component of {request.checkpoint} as it is: nothing is left to do")
    parts = []
    for name, program in programs.items():
        own = recipe_of(name)
        assert own is not None
        parts.append(Part(own, program, program, program, place=name))
    return parts


def _run(part: Part, request: Request, callbacks: Sequence[Callback], progress: Progress) -> Part:
    recipe = part.recipe
    refuse_gates(recipe.gates, recipe.target_name, recipe.target)
    gates = GateKeeper(recipe.gates, recipe.target, progress, allow_nonfinite=request.allow_nonfinite)
    folder = request.out.with_name(f"{request.out.name}.reproducer")
    # What is written is a model alone: its gates name no component.
    alone = [gate.model_copy(update={"component": ""}).as_document() for gate in recipe.gates]
    reproducer = Reproducer(folder, gates=alone, target={recipe.target_name: recipe.target.as_options()})
    reference = Reference(part.original)
    # A pass that a gate withdraws has never been, to those who come after it.
    own: list[Callback] = [Verification(request.verify, request.seed), gates, reference]
    try:
        program, records = run_passes(
            part.original, recipe.steps, [*own, *callbacks, reproducer], recipe.target, progress
        )
    except UserError:
        raise
    except OptpassError as error:
        error.reproducer = reproducer.written
        raise
    return replace(
        part,
        program=program,
        reference=reference.program,
        added=reference.added,
        records=records,
        gates=gates.records,
    )


class Reference:
    """Callback that keeps what results are compared with, and the names of the passes that put something in."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.added: list[str] = []

    def __call__(self, event: Event) -> None:
        if event.kind == "finished" and event.original is not self.program:
            self.program = event.original
            self.added.append(event.step.name)


def _lower(part: Part, request: Request, folder: Path, progress: Progress) -> Part:
    target, name = part.recipe.target, part.recipe.target_name
    if unsupported := target.refuses(part.program):
        shown = "\n  ".join(f"{item.path}: {item.operator}: {item.reason}" for item in unsupported[:10])
        raise UserError(f"target {name!r} cannot take {len(unsupported)} parts of the model:\n  {shown}")
    place = folder / part.place
    place.mkdir(exist_ok=True)
    engines = target.lower(part.program, Lowering(place, allow_nonfinite=request.allow_nonfinite, progress=progress))
    if part.place != "." and any("components" in engine.details for engine in engines.values()):
        raise UserError(
            f"target {name!r} writes a whole pipeline folder, for one component; of several it takes the default layout"
        )
    slots = write_slots(place, engines, allow_nonfinite=request.allow_nonfinite)
    if engines and slots:
        name, engine = next(iter(engines.items()))
        engines = {**engines, name: replace(engine, digests={**engine.digests, **slots})}
    return replace(part, engines=engines)


def _measured(parts: Sequence[Part], request: Request, folder: Path, progress: Progress) -> list[Part]:
    """The parts with the evidence of those whose target runs here; samples are the first one's."""
    runnable = [p for p in parts if p.engines and p.recipe.target.runs() != "elsewhere" and p.program.has_values]
    subjects = [
        Subject(
            part.recipe.target,
            part.reference,
            part.program,
            part.engines,
            folder / part.place,
            _named(part, parts, progress),
            untouched=part.reference.weights is part.original.weights,
        )
        for part in runnable
    ]
    found = dict(zip(map(id, runnable), collect_evidence(subjects, request, progress), strict=True))
    return [replace(part, evidence=found.get(id(part)) or _unmeasured(part)) for part in parts]


def _unmeasured(part: Part) -> Evidence:
    if not part.engines or part.recipe.target.runs() != "elsewhere":
        return part.evidence
    return Evidence(verified=f"compiled only: engines of target {part.recipe.target_name!r} do not run on this machine")


def _settled(recipe: Recipe, parts: Sequence[Part]) -> Recipe:
    """``recipe`` with the options that passes chose while they ran, and without those that were rolled back."""
    for part in parts:
        steps = part.kept_steps
        if steps != part.recipe.steps:
            recipe = recipe.with_steps(part.component, steps)
        left = {step.name for step in steps}
        gone = {record.name for record in part.records} - left
        gates = tuple(gate for gate in recipe.gates if gate not in part.recipe.gates or gate.after not in gone)
        recipe = replace(recipe, gates=gates)
    return recipe


def _record(part: Part) -> PartRecord:
    target, options = part.recipe.target_name, part.recipe.target.as_options()
    return part_record(part.program, target, options, part.engines, part.place, _verified(part))


def _verified(part: Part) -> Verified | None:
    """What stands in the manifest; ``None`` for a report without engines."""
    if not part.engines:
        return None
    return "numerics" if part.evidence.difference is not None else "compiled-only"


def _report(recipe: Recipe, parts: Sequence[Part], request: Request) -> dict[str, Any]:
    """The main part's sections, as for a model alone; of several, a record of each under ``components``."""
    return {
        "schema_version": REPORT_SCHEMA,
        "optpass": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe.as_document(),
        **_part_report(parts[0], request),
        "gates": [gate for part in parts for gate in part.gates],
        "ladder": [rung.as_json() for rung in ladder(*_climbs(parts))],
        "samples": parts[0].evidence.samples,
        "machine": machine(),
        **({"components": [_part_report(part, request) for part in parts]} if recipe.components is not None else {}),
    }


def _climbs(parts: Sequence[Part]) -> tuple[Climb, list[Climb]]:
    """What the ladder is made of: the denoiser, and the others."""
    main, *others = (Climb(part.component, part.original, part.records) for part in parts)
    return main, others


def _part_report(part: Part, request: Request) -> dict[str, Any]:
    origin, recipe, records = part.original.origin.as_json(), part.recipe, part.records
    return {
        "checkpoint": {key: origin[key] for key in ("name", "kind", "class", "component", "sha256", "pipeline")},
        "inputs": {spec.name: list(spec.shape) for graph in part.original.entries.values() for spec in graph.inputs},
        "dimensions": [item.as_json() for graph in part.original.entries.values() for item in graph.dimensions],
        "before": (records[0].before if records else measure(part.original)).as_json(),
        "after": (records[-1].after if records else measure(part.program)).as_json(),
        "passes": [record.as_json() for record in records],
        "loop": loop_record(part.original, part.program, request.steps),
        "target": {
            "name": recipe.target_name,
            "options": recipe.target.as_options(),
            "verified": part.evidence.verified,
        },
        "engines": [_engine(name, engine, part.place) for name, engine in part.engines.items()],
        "added": list(part.added),
        "unhealed": unhealed(part.kept_steps),
        "engine_difference": part.evidence.difference,
        "latency": part.evidence.latency,
    }


def _engine(entry: str, engine: LoweredEntry, place: str) -> dict[str, Any]:
    details = engine.facts()
    return {
        "entry": entry,
        "file": PurePosixPath(place, engine.main).as_posix(),
        "bytes": details.pop("bytes", None),
        "nodes": details.pop("nodes", None),
        "details": details,
    }
