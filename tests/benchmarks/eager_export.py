"""The usual way to ONNX, to compare with: load a diffusers model with its weights, then ``torch.onnx.export`` it.

python eager_export.py MODEL_FOLDER OUT_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(folder: Path, out: Path) -> None:
    """Export a ``UNet2DConditionModel`` in float16 at its own sample size, weights as external data."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True).eval()
    size, config = model.config.sample_size, model.config
    inputs = {
        "sample": torch.zeros(1, config.in_channels, size, size, dtype=torch.float16),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.zeros(1, 77, config.cross_attention_dim, dtype=torch.float16),
    }
    with torch.no_grad():
        torch.onnx.export(model, kwargs=inputs, f=out, dynamo=True, external_data=True, verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
