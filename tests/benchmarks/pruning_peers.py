"""Torch-Pruning on the models that ours is measured on: what each needs to be told, and to be patched afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, Upsample2D
from torch import nn

LAYERS = [nn.modules.conv._ConvNd, nn.Linear]


def magnitude() -> Any:
    """Our ``l2``: the norm over every weight of a group, whether it writes the channel or reads it."""
    return torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None, target_types=LAYERS
    )


def pruner(model: nn.Module, inputs: Mapping[str, Any], ignored: str, ratio: float) -> Any:
    """Its dependency graph and groups: of all channels but those that the layer ``ignored`` gives; heads stay."""
    heads = {
        layer: module.heads
        for module in model.modules()
        if isinstance(module, Attention)
        for layer in (module.to_q, module.to_k, module.to_v)
    }
    return torch_pruning.pruner.BasePruner(
        model,
        dict(inputs),
        importance=magnitude(),
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(ignored)],
        num_heads=heads,
        output_transform=lambda output: (output[0] if isinstance(output, tuple) else output).sum(),
    )


def patch(model: nn.Module) -> int:
    """Set what diffusers' modules remember of their widths and check when they are called; how many were set."""
    found = [module for module in model.modules() if isinstance(module, (Upsample2D, Downsample2D)) and module.use_conv]
    for module in found:
        module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    return len(found)


def prune(model: nn.Module, inputs: Mapping[str, Any], ignored: str, ratio: float) -> nn.Module:
    """``model`` itself, narrower."""
    with torch.enable_grad():
        pruner(model, inputs, ignored, ratio).step()
    patch(model)
    return model
