"""Random models of known families, saved the way their libraries save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, zero-initialised layers and running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


@pytest.fixture(scope="session")
def random_weights() -> Callable[[nn.Module], nn.Module]:
    return randomise


@pytest.fixture
def config_folder(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """A folder that holds nothing but a config.json."""

    def write(config: Mapping[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return write


UNET = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


@pytest.fixture(scope="session")
def small_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return randomise(UNet2DModel(**UNET))


@pytest.fixture
def unet_folder(tmp_path: Path, small_unet: Any) -> Path:
    """A small UNet2DModel saved by diffusers."""
    folder = tmp_path / "unet"
    small_unet.save_pretrained(folder)
    return folder


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that exists once code of a checkpoint ran."""
    return tmp_path / "code-ran"


@pytest.fixture
def runs(marker: Path) -> Runs:
    """An object that creates ``marker`` when it is unpickled."""
    return Runs(marker)
