"""A pipeline whose autoencoder is another one: the bundle generates, and knows as little of it as the folder did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

import optpass
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.testing import randomised


def test_a_bundle_generates_with_the_tiny_autoencoder(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    tiny = randomised(
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()
    )
    tiny.save_pretrained(tmp_path / "tiny")
    swap = {"swap-autoencoder": {"checkpoint": "tiny"}}
    document = {"components": {"transformer": "keep", "vae": {"passes": [swap]}}, "target": "program"}
    recipe = make_recipe(document, folder=tmp_path)
    applied = apply(recipe, Request(str(pipeline_folder("dit")), tmp_path / "out", baseline=False))
    assert applied.report["passes"][0]["verified"] == "measured"
    assert set(applied.report["passes"][0]["files"]) == {
        (tmp_path / "tiny" / name).as_posix() for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert applied.report["engine_difference"]["relative_error"] > 0.01
    pipeline = optpass.load_pipeline(applied.folder)
    assert type(pipeline.vae.config).__name__ == "Config"
    assert pipeline.vae.config.scaling_factor == 0.18215
    images = pipeline([1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = tiny.decode((latents - 0.1) * 0.18215).sample
    torch.testing.assert_close(pipeline.vae.decode(latents).sample, expected, atol=1e-5, rtol=1e-5)
