"""``optpass.load``: a bundle on disk → a module that is called as the captured one was."""

from __future__ import annotations

from pathlib import Path

from optpass.errors import UserError
from optpass.pipeline.registry import target_class
from optpass.runtime.bundle import read_manifest, verify_files
from optpass.runtime.module import EngineModule


def load(bundle: str | Path, *, verify: bool = True) -> EngineModule:
    """The engine of ``bundle``, with the captured module's call signature and output type.

    ``verify`` compares every file with the hash in the manifest first.

    Raises:
        UserError: the folder is no bundle or a damaged one, holds a report alone, or its target is not
            installed here or runs on other hardware only.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if not manifest.entries:
        raise UserError(f"{folder} holds a report and no engine: it was made with --structure-only")
    if verify:
        verify_files(folder, manifest)
    name = manifest.target.name
    target = target_class(name)
    target.check_installed(name)
    if not target.runs_here:
        raise UserError(f"{folder} was built for target {name!r}, which does not run on this machine")
    entry = manifest.entries[manifest.loop.entry if manifest.loop else next(iter(manifest.entries))]
    runner = target.load(folder, entry.model_dump(), manifest.target.options)
    return EngineModule(
        entry.call(),
        tuple(record.spec() for record in entry.inputs),
        tuple(record.spec() for record in entry.outputs),
        runner,
        config=manifest.origin.get("config"),
        dimensions=entry.open_dimensions(),
    )
