"""Three kinds of small model, captured with random weights, for every target to run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program
from optpass.pipeline.target import LoweredEntry, Lowering
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import capture_module

Captured = tuple[Program, nn.Module, dict[str, Tensor]]


class Residual(nn.Module):
    """A ResNet block and a classifier: convolution, BatchNorm, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.skip = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.bn1(self.conv1(image)))
        x = torch.relu(self.bn2(self.conv2(x)) + self.skip(image))
        return {"features": x, "logits": self.fc(x.mean((2, 3)))}


def svd_unet() -> nn.Module:
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        block_out_channels=(32,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2,),
        num_frames=2,
    )


def transformer() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "resnet": (Residual, {"image": torch.zeros(2, 3, 8, 6)}),
    "svd_unet": (
        svd_unet,
        {
            "sample": torch.zeros(2, 2, 8, 8, 6),
            "timestep": torch.tensor(1.0),
            "encoder_hidden_states": torch.zeros(2, 1, 16),
            "added_time_ids": torch.zeros(2, 3),
        },
    ),
    "transformer": (
        transformer,
        {
            "hidden_states": torch.zeros(2, 4, 8, 8),
            "timestep": torch.zeros(2, dtype=torch.long),
            "class_labels": torch.zeros(2, dtype=torch.long),
        },
    ),
}


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Captured]:
    """A model by name: its Program, the real module, and random inputs."""

    @cache
    def capture(name: str) -> Captured:
        build, example = CASES[name]
        program, module = capture_module(build, **example)
        return program, module, random_inputs(program.entries["full"].inputs_at(), {}, seed=3)

    return capture


@pytest.fixture(scope="session")
def lowered(captured: Callable[[str], Captured], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A model by name, lowered by ONNX Runtime's target with its defaults: folder and entry."""

    @cache
    def lower(name: str) -> tuple[Path, LoweredEntry]:
        folder = tmp_path_factory.mktemp(name)
        return folder, OnnxRuntime().lower(captured(name)[0], Lowering(folder))["full"]

    return lower
