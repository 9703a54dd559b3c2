"""A bundle's lock file applied once more: the Program that was lowered, with nothing written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optpass.capture.digest import checkpoint_digest
from optpass.errors import UserError
from optpass.ir.program import Program
from optpass.pipeline.apply import Part, Reference, captured_parts
from optpass.pipeline.manager import run_passes
from optpass.pipeline.plan import NOWHERE
from optpass.pipeline.progress import Progress
from optpass.pipeline.recipe import load_recipe
from optpass.pipeline.records import LOCK
from optpass.pipeline.request import Request
from optpass.pipeline.target import Target
from optpass.runtime.bundle import PartRecord, read_manifest


@dataclass(frozen=True)
class Replayed:
    """``program`` is what was lowered to ``target``; ``reference`` is what it is compared with, as in the report."""

    reference: Program
    program: Program
    target_name: str
    target: Target


def replay(checkpoint: str, bundle: Path, component: str | None, progress: Progress) -> Replayed:
    """Apply the passes of ``bundle``'s lock file, with the options that they settled, to ``checkpoint``.

    Gates and contracts are not checked again.

    Raises:
        UserError: there is no bundle with engines, ``checkpoint`` is not what it was made from, or what the passes
            give now has another interface.
    """
    manifest = read_manifest(bundle)
    record = manifest.part(component)
    if not record.entries:
        raise UserError(f"{bundle} holds a report and no engine: it was made with --structure-only")
    recipe = load_recipe(bundle / LOCK)
    # A recipe with components says itself which are captured.
    asked = record.component if recipe.components is None else ""
    progress("capture", 0.0)
    part = _part(captured_parts(recipe, Request(checkpoint, NOWHERE, component=asked or None)), record)
    _check_identity(checkpoint, bundle, part, record)
    progress("capture", 1.0)
    reference = Reference(part.original)
    progress("apply the passes again", 0.0)
    program, _ = run_passes(part.original, part.recipe.steps, [reference], part.recipe.target)
    progress("apply the passes again", 1.0)
    _check_interfaces(bundle, program, record)
    return Replayed(reference.program, program, part.recipe.target_name, part.recipe.target)


def _part(parts: list[Part], record: PartRecord) -> Part:
    found = [part for part in parts if part.component == record.component]
    if not found:
        known = ", ".join(part.component or "(the model)" for part in parts)
        raise UserError(f"the checkpoint has no {record.component!r}; it has {known}")
    return found[0]


def _check_identity(checkpoint: str, bundle: Path, part: Part, record: PartRecord) -> None:
    if not part.original.has_values:
        raise UserError(f"{checkpoint} has no weights to compare with")
    if record.origin.get("sha256") != checkpoint_digest(part.original):
        raise UserError(f"{checkpoint} is not the checkpoint that {bundle} was made from: its content differs")


def _check_interfaces(bundle: Path, program: Program, record: PartRecord) -> None:
    made, written = program.interfaces, record.interfaces
    if {n: (i.inputs, i.outputs) for n, i in made.items()} != {n: (i.inputs, i.outputs) for n, i in written.items()}:
        raise UserError(
            f"{bundle / LOCK} gives another model than the one in the bundle: was it made with --inputs, --weights "
            "or another version of optpass?"
        )
