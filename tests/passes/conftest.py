from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from optpass.capture.sources import capture
from optpass.ir.program import Program
from optpass.testing import capture_module, randomised


@pytest.fixture
def capture_open(tmp_path: Path) -> Callable[..., Program]:
    """Captures a class ``Model``, given as text, with open sizes and random weights."""

    def capture_text(source: str, example: str, sizes: Mapping[str, Any]) -> Program:
        path = tmp_path / "model.py"
        code = f"import torch\nfrom torch import nn\nfrom torch.nn import functional\n{dedent(source)}"
        path.write_text(f"{code}\ndef model():\n    return Model()\n\ndef model_inputs():\n    return {example}\n")
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        save_file(randomised(namespace["Model"]()).state_dict(), tmp_path / "model.safetensors")
        return capture(f"{path}:model", weights=tmp_path / "model.safetensors", inputs=sizes)

    return capture_text


@pytest.fixture(scope="session")
def tiny_svd():
    """SVD's own class with four cross-attentions of each kind: Program, module, inputs of one clip of three frames."""
    from diffusers import UNetSpatioTemporalConditionModel

    def build():
        return UNetSpatioTemporalConditionModel(
            sample_size=8,
            in_channels=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=1,
            cross_attention_dim=32,
            transformer_layers_per_block=1,
            num_attention_heads=(2, 4),
            num_frames=3,
        )

    inputs = {
        "sample": torch.randn(1, 3, 8, 8, 8),
        "timestep": torch.tensor(999.0),
        "encoder_hidden_states": torch.randn(1, 1, 32),
        "added_time_ids": torch.randn(1, 3),
    }
    program, module = capture_module(build, **inputs)
    return program, module, inputs
