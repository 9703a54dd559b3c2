from __future__ import annotations

import pytest
import torch

from optpass.testing import capture_module


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
