"""A checkpoint on disk → a Program: the list of source kinds, and the choice among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from optpass.capture import (
    diffusers_model,
    diffusers_pipeline,
    exported_file,
    factory,
    saved_program,
    timm_model,
    transformers_model,
)
from optpass.capture.precision import PRECISIONS
from optpass.capture.request import Request, Source
from optpass.capture.spans import Sizes
from optpass.collection import collection_paused
from optpass.errors import UserError
from optpass.ir.program import Program

KINDS: tuple[Source, ...] = (
    factory,
    exported_file,
    saved_program,
    diffusers_pipeline,
    diffusers_model,
    transformers_model,
    timm_model,
)
"""Source kinds in the order they are asked; the first that recognises the path captures it."""

SHOWN = 8


def capture(
    source: str | Path,
    *,
    inputs: Sizes | None = None,
    structure_only: bool = False,
    weights: Path | None = None,
    trust_remote_code: bool = False,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    floats: Collection[torch.dtype] = PRECISIONS.values(),
) -> Program:
    """The Program of a checkpoint, its weights lazy.

    ``inputs`` gives sizes by input name; sizes that inputs share (batch, frames) follow. A checkpoint
    without any weight file is captured structure-only, as is one with ``structure_only``. ``weights``
    names a weight file for a source that has none of its own. ``component`` chooses a part of a
    pipeline folder (default: its denoiser), or a module of a model by its path. ``dtype`` is what
    floating weights are computed in; by default the one dtype that they have in the checkpoint, where it
    is among ``floats``, else float32.

    Raises:
        UserError: no kind of source recognises ``source``, or it cannot be captured.
        WeightError: a weight file is damaged, or does not fit the model.
    """
    path, function = factory.split(str(source))
    request = Request(
        path=path,
        function=function,
        sizes=dict(inputs or {}),
        structure_only=structure_only,
        weights=weights,
        trust_remote_code=trust_remote_code,
        component=component,
        given_dtype=dtype,
        floats=floats,
    )
    if weights is not None and not weights.is_file():
        raise UserError(f"no weight file at {weights}")
    for kind in KINDS:
        if kind.recognises(request):
            with collection_paused():
                return kind.capture(request)
    raise UserError(f"{source} is no checkpoint that optpass knows: {_found(path)}\n{_understood()}")


def capture_pipeline(
    source: str | Path,
    wanted: diffusers_pipeline.Wanted,
    *,
    call: Mapping[str, Any] | None = None,
    structure_only: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    floats: Collection[torch.dtype] = PRECISIONS.values(),
) -> dict[str, Program]:
    """Programs of a pipeline folder's components by name, the denoiser first, with the calls that the pipeline makes.

    ``wanted`` says which, and their sizes; the weights of the others are not read. ``call`` are arguments of
    the pipeline's call (``height`` …) from which all other sizes follow; ``dtype`` and ``floats`` are those
    of :func:`capture`, by component.

    Raises:
        UserError: ``source`` is no pipeline folder, or it cannot be called or captured.
        WeightError: a weight file is damaged, or does not fit its model.
    """
    request = Request(
        Path(source),
        structure_only=structure_only,
        trust_remote_code=trust_remote_code,
        given_dtype=dtype,
        floats=floats,
    )
    if not diffusers_pipeline.recognises(request):
        raise UserError(f"{source} is no pipeline folder (it has no model_index.json), and the recipe has 'components'")
    with collection_paused():
        return diffusers_pipeline.capture_components(request, wanted, call or {})


def _understood() -> str:
    return "Understood are:\n" + "\n".join(f"  - {kind.DESCRIPTION}" for kind in KINDS)


def _found(path: Path) -> str:
    if not path.exists():
        return "there is no such file or folder"
    if path.is_file():
        return _found_file(path)
    names = sorted(entry.name for entry in path.iterdir())
    if "manifest.json" in names:
        return "it is a bundle, which holds engines and no program; apply the recipe to the checkpoint it was made from"
    if not names:
        return "the folder is empty"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"the folder holds {', '.join(names[:SHOWN])}{more}"


def _found_file(path: Path) -> str:
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"):
        return "it holds weights and no model; give the model as path/to/file.py:function and this file as --weights"
    if path.suffix == ".py":
        return f"name the function that builds the model: {path.name}:function"
    if path.suffix == ".json":
        return (
            "the config names no diffusers class (_class_name), no transformers one (model_type), "
            "and no timm one (architecture)"
        )
    return f"it is a file of type {path.suffix or 'unknown'!r}"
