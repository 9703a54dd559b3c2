"""Classes of diffusers and transformers that a file may name, and nothing else of theirs or of anybody's."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

LIBRARIES = ("diffusers", "transformers")


def library_class(library: str, name: str) -> Any:
    """The class ``name`` of a library, or of one of diffusers' own pipeline folders (``stable_diffusion``).

    ``None`` when there is none that ``from_pretrained`` or ``from_config`` loads: a name that comes from a
    checkpoint or a bundle reaches no other code.
    """
    if not (library.isidentifier() and name.isidentifier()):
        return None
    if library not in LIBRARIES:
        import diffusers.pipelines

        if library not in diffusers.pipelines.__all__ and not hasattr(diffusers.pipelines, library):
            return None
        library = f"diffusers.pipelines.{library}"
    try:
        # Names of old checkpoints: feature extractors of images became image processors.
        module = importlib.import_module(library)
        found = getattr(module, name, None) or getattr(module, name.replace("FeatureExtractor", "ImageProcessor"), None)
    except (ImportError, RuntimeError):
        return None
    return found if isinstance(found, type) and _is_of_library(found) else None


def _is_of_library(found: type) -> bool:
    return found.__module__.split(".")[0] in LIBRARIES and hasattr(found, "from_pretrained")


def model_skeleton(library: str, name: str, config: Mapping[str, Any]) -> nn.Module | None:
    """The model of a configuration with weights that have shapes only; ``None`` where the library has none such."""
    from optpass.capture.export import build_fake

    found = library_class(library, name)
    if library not in LIBRARIES or found is None or not issubclass(found, nn.Module):
        return None
    if library == "diffusers":
        return build_fake(lambda: found.from_config(dict(config)))[0]
    settings = model_config(config)
    return None if settings is None else build_fake(lambda: found(settings))[0]


def model_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object of a ``config.json``, defaults included; ``None`` for an unknown type."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return CONFIG_MAPPING[kind].from_dict(dict(config)) if kind in CONFIG_MAPPING else None
