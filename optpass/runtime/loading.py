"""``optpass.load`` and ``optpass.load_pipeline``: a bundle on disk → modules called as the captured ones were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optpass.errors import UserError
from optpass.pipeline.registry import target_class
from optpass.runtime.bundle import Manifest, PartRecord, read_manifest, verify_files
from optpass.runtime.looped import LoopModule
from optpass.runtime.module import EngineModule, component_of


def load(bundle: str | Path, *, component: str | None = None, verify: bool = True) -> EngineModule:
    """The engine of ``bundle``, with the captured module's call signature and output type.

    ``component`` chooses one of a pipeline's components that were lowered (default: the denoiser). One that
    a pipeline calls by other methods than its own call has these (``vae.decode``). ``verify`` compares every
    file with the hash in the manifest first.

    Raises:
        UserError: the folder is no bundle or a damaged one, holds a report alone or no engine of
            ``component``, or its target is not installed here or runs on other hardware only.
    """
    folder = Path(bundle)
    manifest = _opened(folder, verify)
    return load_part(folder, manifest.part(component))


def load_pipeline(bundle: str | Path, *, verify: bool = True) -> Any:
    """The diffusers pipeline of ``bundle``: engines where components were lowered, the carried modules elsewhere.

    Its class is diffusers' own (or :class:`~optpass.runtime.class_to_video.ClassToVideoPipeline`); no code of the
    checkpoint runs. Carried modules compute in float32.

    Raises:
        UserError: as :func:`load`, or the bundle carries no pipeline of such a class.
    """
    folder = Path(bundle)
    manifest = _opened(folder, verify)
    if manifest.components is None:
        raise UserError(f"{folder} holds a model and no pipeline; load it with optpass.load")
    from optpass.runtime.folder import build_pipeline

    return build_pipeline(folder / manifest.components, load_parts(folder, manifest))


def load_parts(folder: Path, manifest: Manifest) -> dict[str, EngineModule]:
    """Every lowered component by its name in the pipeline; files were verified by the caller."""
    return {part.component: load_part(folder, part) for part in manifest.all_parts()}


def _opened(folder: Path, verify: bool) -> Manifest:
    manifest = read_manifest(folder)
    if not manifest.entries:
        raise UserError(f"{folder} holds a report and no engine: it was made with --structure-only")
    if verify:
        verify_files(folder, manifest)
    return manifest


def load_part(folder: Path, part: PartRecord) -> EngineModule:
    """The engines of one component of the bundle in ``folder``; files were verified by the caller.

    Raises:
        UserError: the target is not installed here or runs on other hardware only.
    """
    name = part.target.name
    target = target_class(name)
    target.check_installed(name)
    if target.of(name, part.target.options).runs() == "elsewhere":
        raise UserError(f"{folder} was built for target {name!r}, which does not run on this machine")
    origin: dict[str, Any] = {
        "config": part.origin.get("config"),
        "library": str(part.origin.get("library", "")),
        "class_name": str(part.origin.get("class", "")),
    }
    runners = {
        key: target.load(folder / part.folder, entry.model_dump(), part.target.options)
        for key, entry in part.entries.items()
    }
    loop = part.driven()
    if loop and not loop.stateless:
        return LoopModule(loop, part.interfaces, runners, **origin)
    engines = {}
    for key, entry in part.entries.items():
        found = entry.interface()
        engines[key] = EngineModule(
            entry.call(), found.inputs, found.outputs, runners[key], dimensions=found.dimensions, **origin
        )
    return component_of(engines)
