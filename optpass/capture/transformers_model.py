"""Source: a transformers model folder, or its bare config (structure only)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from optpass.capture.configs import config_path, model_config, refuse_remote_code
from optpass.capture.export import build_fake
from optpass.capture.inputs import BUILDERS, Inputs, given_inputs
from optpass.capture.opened import captured, opened
from optpass.capture.request import Opened, Request
from optpass.capture.transformers_weights import module_weights
from optpass.errors import UserError, nearest
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.quiet import first_lines, quiet

DESCRIPTION = "a transformers model: a folder with config.json (or that file alone, structure only)"


def recognises(request: Request) -> bool:
    """A config with transformers' ``model_type`` or ``architectures``."""
    config = model_config(request.path)
    return "model_type" in config or "architectures" in config


def capture(request: Request) -> Program:
    """The first of the config's ``architectures``, its weights those of the folder, or absent when it has none.

    ``request.component`` names a submodule that is captured alone.

    Raises:
        UserError: the model type or class is unknown, the config does not build it, or it has remote code.
        WeightError: the weights are damaged, or do not fit.
    """
    model = open_model(request)
    return captured(request, model, _inputs(model.module, model.config, request))


def open_model(request: Request) -> Opened:
    """The model with fake parameters, and its weights.

    Raises:
        UserError: as :func:`capture`.
        WeightError: the weights are damaged.
    """
    raw, path = model_config(request.path), config_path(request.path)
    assert path is not None
    refuse_remote_code(raw, path, request.trust_remote_code)
    with quiet("transformers", logging.CRITICAL):
        config = _config(raw, path, request.trust_remote_code)
        built = build_fake(lambda: _build(config, raw, path, request.trust_remote_code), request.dtype)
        checkpoint = _weights(built[0], request)
    model = opened(request, built, checkpoint, library="transformers", config=raw)
    return replace(model, config=getattr(model.module, "config", config).to_dict())


def _config(raw: Mapping[str, Any], path: Path, trust: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = raw.get("model_type")
    if not trust and kind not in CONFIG_MAPPING:
        hint = nearest(str(kind), list(CONFIG_MAPPING.keys()))
        raise UserError(f"{path}: transformers has no model_type {kind!r}{hint if 'did you mean' in hint else ''}")
    try:
        if trust and raw.get("auto_map"):
            return AutoConfig.from_pretrained(path.parent, trust_remote_code=True, local_files_only=True)
        return CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:
        raise UserError(f"{path} is no valid {kind} config: {first_lines(error)}") from error


def _build(config: Any, raw: Mapping[str, Any], path: Path, trust: bool) -> nn.Module:
    import transformers

    names = raw.get("architectures") or []
    try:
        if trust and raw.get("auto_map"):
            return transformers.AutoModel.from_config(config, trust_remote_code=True)  # type: ignore[no-any-return]
        module_class = _architecture(str(names[0]), path) if names else transformers.AutoModel.from_config
        return module_class(config)  # type: ignore[no-any-return]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} does not build {names or config.model_type}: {first_lines(error)}") from error


def _architecture(name: str, path: Path) -> Any:
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        known = [known for known in dir(transformers) if known.startswith(name[:3])]
        raise UserError(f"{path}: transformers has no model class {name!r}{nearest(name, known)}")
    return found


def _inputs(module: nn.Module, config: Mapping[str, Any], request: Request) -> Inputs:
    from optpass.capture.inputs_transformers import resampled, transformers_inputs

    builder = BUILDERS.get(type(module).__name__)
    try:
        inputs = builder(config) if builder else transformers_inputs(module, config)
        return resampled(inputs, module, request.sizes)
    except UserError:
        if not request.sizes:
            raise
        return given_inputs(module, request.sizes)


def _weights(module: Any, request: Request) -> dict[str, Expression] | None:
    found = request.checkpoint
    return None if found is None else module_weights(module, found)
