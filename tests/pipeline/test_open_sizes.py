"""A recipe with open sizes, all the way: capture, a pass, ONNX Runtime, the bundle, calls of many sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optpass
from optpass.errors import UserError
from optpass.pipeline.apply import Applied, apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.testing import randomised

RECIPE = {
    "name": "open",
    "inputs": {"sample": ["1..2", "2..4", 8, "8..32:2", "8..32:2"]},
    "passes": ["single-token-attention"],
    "target": {"onnxruntime": {"threads": 1}},
}
SIZES = [(1, 2, 8, 8), (2, 3, 20, 20), (1, 4, 32, 10), (2, 2, 8, 32)]


def unet() -> nn.Module:
    from diffusers import UNetSpatioTemporalConditionModel

    model: nn.Module = UNetSpatioTemporalConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        num_frames=3,
    )
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Applied]:
    folder = tmp_path_factory.mktemp("open")
    torch.manual_seed(0)
    model: Any = randomised(unet().eval())
    model.save_pretrained(folder / "unet")
    request = Request(checkpoint=str(folder / "unet"), out=folder / "bundle", baseline=False)
    return model, apply(make_recipe(RECIPE), request)


def call(batch: int, frames: int, height: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch + frames + height + width)
    return {
        "sample": torch.randn(batch, frames, 8, height, width, generator=generator),
        "timestep": torch.tensor(3.0),
        "encoder_hidden_states": torch.randn(batch, 1, 16, generator=generator),
        "added_time_ids": torch.rand(batch, 3, generator=generator) * 100,
    }


def test_one_engine_serves_every_size(made: tuple[Any, Applied]) -> None:
    model, applied = made
    engine = optpass.load(applied.folder)
    for sizes in SIZES:
        inputs = call(*sizes)
        with torch.no_grad():
            expected = model(**inputs).sample
        found = engine(**inputs).sample
        torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_the_pass_found_every_site_and_held(made: tuple[Any, Applied]) -> None:
    report = made[1].report
    assert report["passes"][0]["sites"] == 8
    assert report["passes"][0]["verified"].startswith("held")
    assert report["engine_difference"]["relative_error"] < 1e-5
    assert [item["name"] for item in report["dimensions"]] == ["batch", "frames", "height", "width"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 2, 8, 8), r"input sample\[0\]: batch is 3, and the engine was built for 1..2"),
        ((1, 5, 8, 8), "frames is 5, and the engine was built for 2..4"),
        ((1, 2, 9, 8), "height is 9, and the engine was built for 8..32 in steps of 2"),
        ((1, 2, 8, 34), "width is 34, and the engine was built for 8..32 in steps of 2"),
    ],
)
def test_a_call_outside_the_ranges_says_so(made: tuple[Any, Applied], sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optpass.load(made[1].folder)(**call(*sizes))


def test_inputs_that_disagree_are_named(made: tuple[Any, Applied]) -> None:
    inputs = call(2, 2, 8, 8)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:1]
    with pytest.raises(UserError, match=r"sample\[0\] and encoder_hidden_states\[0\] disagree on batch: 2 and 1"):
        optpass.load(made[1].folder)(**inputs)


def test_the_manifest_declares_the_ranges_and_damage_is_noticed(made: tuple[Any, Applied], tmp_path: Path) -> None:
    import shutil

    bundle = tmp_path / "bundle"
    shutil.copytree(made[1].folder, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    entry = manifest["entries"]["full"]
    assert entry["inputs"][0]["shape"] == ["batch", "frames", 8, "height", "width"]
    assert entry["dimensions"]["items"][2]["step"] == 2
    entry["dimensions"]["items"].pop()
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UserError, match="'width' has no range"):
        optpass.load(bundle)
