"""Source: a diffusers pipeline folder, of which the denoiser is captured.

The pipeline's own class is never imported: it may be anything, and may not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optpass.capture import diffusers_model, transformers_model
from optpass.capture.configs import PIPELINE_INDEX, config_path
from optpass.capture.request import Request, Source
from optpass.errors import UserError, nearest
from optpass.ir.program import Program
from optpass.untrusted import inside, read_json

DESCRIPTION = "a diffusers pipeline: a folder with model_index.json"
DENOISERS = ("unet", "transformer")
LIBRARIES = ("diffusers", "transformers")
GUIDED_BATCH = 2
"""Classifier-free guidance runs the conditional and the unconditional half as one batch."""


def recognises(request: Request) -> bool:
    """A folder with ``model_index.json``."""
    return (request.path / PIPELINE_INDEX).is_file()


def capture(request: Request) -> Program:
    """The denoiser (or ``request.component``) as a Program that knows its pipeline and its loop.

    A component's own module, ``unet.mid_block``, knows neither.

    Raises:
        UserError: the index is damaged, leaves the folder, or has no such component.
        WeightError: the component's weights are damaged, or do not fit.
    """
    index = request.path / PIPELINE_INDEX
    components = _components(read_json(index), request.path, index, request.trust_remote_code)
    name, _, inside = _chosen(request, components).partition(".")
    folder = components[name]
    if config_path(folder) is None:
        raise UserError(f"{index} lists the component {name!r}, but {folder} has no config.json")
    denoises = name in DENOISERS and not inside
    part = replace(
        request,
        path=folder,
        component=inside or None,
        loop=denoises,
        defaults={"batch": GUIDED_BATCH} if denoises else {},
    )
    kinds: tuple[Source, ...] = (diffusers_model, transformers_model)
    for kind in kinds:
        if kind.recognises(part):
            program = kind.capture(part)
            if inside:
                return program
            origin = replace(program.origin, path=request.path.resolve(), component=name, pipeline=True)
            return replace(program, origin=origin)
    raise UserError(f"{folder}/config.json names neither a diffusers class (_class_name) nor a transformers model_type")


def _components(index: Mapping[str, Any], folder: Path, path: Path, trust: bool) -> dict[str, Path]:
    """Component names and folders; every name in the index is checked, not only the chosen one."""
    found: dict[str, Path] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        parts = [part for part in entry if part is not None]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{path} is damaged: {name!r} is not a pair of library and class")
        inside(folder, name, path)
        for part in parts:
            inside(folder, part, path)
        if not parts:
            continue
        if parts[0] not in LIBRARIES and (folder / name / f"{parts[0]}.py").is_file() and not trust:
            raise UserError(
                f"{path}: the component {name!r} is Python code of the checkpoint ({name}/{parts[0]}.py); nothing in a "
                "checkpoint runs: read that code, then pass --trust-remote-code if you trust it"
            )
        found[name] = folder / name
    return found


def _chosen(request: Request, components: Mapping[str, Path]) -> str:
    if request.component is not None:
        if request.component.partition(".")[0] not in components:
            hint = nearest(request.component, components)
            raise UserError(f"{request.path} has no component {request.component!r}{hint}")
        return request.component
    for name in DENOISERS:
        if name in components:
            return name
    known = ", ".join(sorted(components)) or "none"
    raise UserError(f"{request.path} has no denoiser ({' or '.join(DENOISERS)}); components to choose from: {known}")
