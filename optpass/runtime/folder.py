"""A diffusers pipeline folder → the pipeline, some of its components replaced; no code of the folder runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optpass.capture.checkpoint_weights import weight_file
from optpass.capture.configs import PIPELINE_INDEX
from optpass.errors import UserError
from optpass.quiet import first_lines, quiet
from optpass.runtime.library import library_class
from optpass.runtime.module import EngineModule
from optpass.untrusted import inside, read_json

OWN_CLASS = "ClassToVideoPipeline"


def pipeline_class(folder: Path) -> Any:
    """The class that ``model_index.json`` names: diffusers' own, or this package's.

    Raises:
        UserError: it is neither.
    """
    name = read_json(folder / PIPELINE_INDEX).get("_class_name")
    if name == OWN_CLASS:
        from optpass.runtime.class_to_video import ClassToVideoPipeline

        return ClassToVideoPipeline
    from diffusers import DiffusionPipeline

    found = library_class("diffusers", name) if isinstance(name, str) else None
    if found is None or not issubclass(found, DiffusionPipeline):
        raise UserError(
            f"{folder / PIPELINE_INDEX} names the pipeline {name!r}, which diffusers does not have, and code of a "
            "checkpoint is not run: load the engine with optpass.load(BUNDLE) and put it into your pipeline"
        )
    return found


def listed_components(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class name of every component that ``model_index.json`` lists.

    Raises:
        UserError: the index is damaged, or a name in it leaves the folder.
    """
    path = folder / PIPELINE_INDEX
    found = {}
    for name, value in read_json(path).items():
        if not name.startswith("_") and _is_pair(value) and None not in value:
            inside(folder, name, path)
            found[name] = (value[0], value[1])
    return found


def neural_components(folder: Path) -> list[str]:
    """The listed components that are models of diffusers or transformers, in the index's order."""
    found = []
    for name, (library, class_name) in listed_components(folder).items():
        component = library_class(library, class_name)
        if library in ("diffusers", "transformers") and component is not None and issubclass(component, nn.Module):
            found.append(name)
    return found


def build_pipeline(folder: Path, replaced: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of ``folder``; components in ``replaced`` are taken from there, the others are loaded.

    It computes in ``dtype``, whatever its engines compute in.

    Raises:
        UserError: the class or a component's is unknown, or a component is missing or damaged.
    """
    path = folder / PIPELINE_INDEX
    chosen = pipeline_class(folder)
    parameters = inspect.signature(chosen.__init__).parameters
    listed = listed_components(folder)
    given: dict[str, Any] = {}
    with quiet_libraries():
        for name, value in read_json(path).items():
            if name.startswith("_") or name not in parameters:
                continue
            if name in replaced:
                given[name] = replaced[name]
                if isinstance(replaced[name], EngineModule):
                    replaced[name].precision = dtype
            elif name in listed:
                given[name] = _loaded(folder, name, *listed[name], dtype)
            else:
                given[name] = None if _is_pair(value) else value
        try:
            pipeline = chosen(**given)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not build a {chosen.__name__}: {first_lines(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _loaded(folder: Path, name: str, library: str, class_name: str, dtype: torch.dtype) -> Any:
    component = library_class(library, class_name)
    if component is None:
        raise UserError(
            f"{folder / PIPELINE_INDEX}: the component {name!r} is a {library}.{class_name}, which is no class of "
            "diffusers or transformers here; nothing else is loaded"
        )
    options: dict[str, Any] = {"local_files_only": True}
    if issubclass(component, nn.Module):
        options["torch_dtype" if library != "transformers" else "dtype"] = dtype
        weights = weight_file(folder / name)
        # from_pretrained does not look for half-precision files by itself.
        variant = next((key for key in ("fp16", "bf16") if weights and f".{key}." in weights.name), None)
        options |= {"variant": variant} if variant else {}
    try:
        loaded = component.from_pretrained(folder / name, **options)
    except Exception as error:
        raise UserError(f"cannot load the component {name!r} of {folder}: {first_lines(error)}") from error
    return loaded.eval() if isinstance(loaded, nn.Module) else loaded


def _is_pair(value: Any) -> bool:
    """Whether a value of the index is ``[library, class]``; both are null for a component that is left out."""
    return isinstance(value, list) and len(value) == 2 and all(item is None or isinstance(item, str) for item in value)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without progress bars and advice on standard error."""
    from transformers.utils import logging as transformers_logging

    showed = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet("diffusers", logging.ERROR), quiet("transformers", logging.ERROR):
            yield
    finally:
        if showed:
            transformers_logging.enable_progress_bar()
