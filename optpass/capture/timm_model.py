"""Source: a timm model folder as timm publishes it on the Hugging Face hub, or its bare config (structure only)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import nn

from optpass.capture.configs import CONFIG, config_path, model_config
from optpass.capture.export import build_fake
from optpass.capture.inputs import given_inputs
from optpass.capture.inputs_timm import timm_inputs
from optpass.capture.opened import captured, opened
from optpass.capture.request import Request
from optpass.capture.timm_import import timm_importable
from optpass.errors import UserError, WeightError, nearest
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.quiet import first_lines, quiet

DESCRIPTION = "a timm model: a folder with config.json (or that file alone, structure only); needs optpass[timm]"
ARCHITECTURE = "architecture"
FILTER = "checkpoint_filter_fn"
"""What timm's model files call the function that brings a checkpoint's names up to date."""


def recognises(request: Request) -> bool:
    """A config with timm's ``architecture``."""
    return ARCHITECTURE in model_config(request.path)


def capture(request: Request) -> Program:
    """The model that timm builds from the config, its weights those of the folder, or absent when it has none.

    ``request.component`` names a submodule that is captured alone.

    Raises:
        UserError: timm is not installed, has no such architecture, or the config does not build it.
        WeightError: the weights are damaged, or do not fit.
    """
    config, path = model_config(request.path), config_path(request.path)
    assert path is not None
    timm = _timm(path)
    with quiet("timm", logging.CRITICAL):
        built = build_fake(lambda: _build(timm, config, path), request.dtype)
    checkpoint = request.checkpoint
    if checkpoint is not None:
        checkpoint = _renamed(built[0], checkpoint)
    model = opened(request, built, checkpoint, library="timm", config=config)
    return captured(request, model, timm_inputs(model.module) or given_inputs(model.module, request.sizes))


def _timm(path: Path) -> ModuleType:
    try:
        with timm_importable():
            import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise UserError(f"timm, which {path} needs, does not load: {error}") from error
        # A torchvision from the registry loads beside no CPU build of torch, and then diffusers fails with it.
        raise UserError(
            f"{path} is a timm model, and timm is not installed: pip install 'optpass[timm]', "
            "or, beside a torch without CUDA, pip install --no-deps timm"
        ) from error
    found: ModuleType = timm
    return found


def _build(timm: Any, config: Mapping[str, Any], path: Path) -> nn.Module:
    name = config[ARCHITECTURE]
    if not isinstance(name, str) or not timm.is_model(name):
        hint = nearest(str(name), timm.list_models())
        raise UserError(f"{path}: timm has no architecture {name!r}{hint if 'did you mean' in hint else ''}")
    try:
        # timm reads a folder's config.json under that name alone, and the config may be a file of any name.
        with TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            module: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False, exportable=True)
    except Exception as error:
        raise UserError(f"{path} does not build a {name}: {first_lines(error)}") from error
    return module


def _renamed(module: nn.Module, found: dict[str, Expression]) -> dict[str, Expression]:
    """Names of an older checkpoint → the module's names, by the function of timm that does so when it loads one.

    Raises:
        WeightError: timm would also compute on the values, which is not lazy.
    """
    wanted = module.state_dict().keys()
    rename = getattr(sys.modules[type(module).__module__], FILTER, None)
    if rename is None or wanted <= found.keys():
        return found
    # Tensors without values stand for the expressions: what timm passes on unchanged, it only renamed.
    standing = {torch.empty(e.shape, dtype=e.dtype, device="meta"): (name, e) for name, e in found.items()}
    try:
        renamed = rename({name: tensor for tensor, (name, _) in standing.items()}, module)
    except Exception:
        return found
    computed = [name for name, tensor in renamed.items() if tensor not in standing and name in wanted]
    if computed:
        raise WeightError(
            f"timm computes {computed[0]!r} from other tensors when it loads this checkpoint, which lazy weights "
            "cannot; load it with timm.create_model and save it with timm.models.save_for_hf"
        )
    return {name: standing[tensor][1] for name, tensor in renamed.items() if tensor in standing}
