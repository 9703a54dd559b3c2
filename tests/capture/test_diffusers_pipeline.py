"""Pipeline folders: the denoiser is captured, and no name in the index leaves the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optpass.capture.sources import capture
from optpass.errors import UserError


@pytest.fixture
def pipeline(tmp_path: Path, small_unet: Any) -> Path:
    """A pipeline of a class that no library has."""
    folder = tmp_path / "pipeline"
    small_unet.save_pretrained(folder / "unet")
    write_index(folder, {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]})
    return folder


def write_index(folder: Path, components: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    index = {"_class_name": "ClassToVideoPipeline", "_diffusers_version": "0.42.1", **components}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def test_the_denoiser_is_captured_at_the_batch_of_guidance(
    pipeline: Path, small_unet: Any, assert_same_function: Any
) -> None:
    program = capture(pipeline)
    assert program.entries["full"].inputs[0].shape == (2, 2, 8, 8)
    assert program.loop is not None
    assert (program.loop.sample, program.loop.timestep) == ("sample", "timestep")
    assert (dict(program.loop.variants), program.loop.stateless) == ({"full": ("full",)}, True)
    assert program.origin.pipeline
    assert program.origin.path == pipeline.resolve()
    assert (program.origin.component, program.origin.class_name) == ("unet", "UNet2DModel")
    assert_same_function(program, small_unet)


def test_the_users_sizes_go_before_the_batch_of_guidance(pipeline: Path) -> None:
    assert capture(pipeline, inputs={"sample": [1, 2, 8, 8]}).entries["full"].inputs[0].shape == (1, 2, 8, 8)


def test_another_component_is_captured_on_request(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path / "vae")
    write_index(tmp_path, {"vae": ["diffusers", "AutoencoderTiny"]})
    with pytest.raises(UserError, match=r"has no denoiser \(unet or transformer\); components to choose from: vae"):
        capture(tmp_path)
    program = capture(tmp_path, component="vae", inputs={"sample": [1, 3, 16, 16]})
    assert program.loop is None
    assert program.origin.component == "vae"


def test_an_unknown_component_is_refused_with_the_nearest(pipeline: Path) -> None:
    with pytest.raises(UserError, match="has no component 'unets'; did you mean 'unet'"):
        capture(pipeline, component="unets")


def test_a_component_without_its_folder_is_refused(pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"lists the component 'scheduler', but .* has no config\.json"):
        capture(pipeline, component="scheduler")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/../../b", "C:\\windows", "..\\up", "a\nb"])
@pytest.mark.parametrize("place", ["component", "library"])
def test_names_that_leave_the_folder_are_refused(pipeline: Path, name: str, place: str) -> None:
    bad = {name: ["diffusers", "UNet2DModel"]} if place == "component" else {"extra": [name, "UNet2DModel"]}
    write_index(pipeline, {"unet": ["diffusers", "UNet2DModel"], **bad})
    with pytest.raises(UserError, match="is outside its folder; refused"):
        capture(pipeline)


def test_a_component_of_the_checkpoints_own_code_is_refused(pipeline: Path, marker: Path) -> None:
    (pipeline / "unet" / "mine.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    write_index(pipeline, {"unet": ["mine", "Mine"]})
    with pytest.raises(UserError, match="is Python code of the checkpoint"):
        capture(pipeline)
    assert not marker.exists()


def test_a_damaged_index_is_refused(pipeline: Path) -> None:
    (pipeline / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        capture(pipeline)
    write_index(pipeline, {"unet": ["diffusers", 3]})
    with pytest.raises(UserError, match="'unet' is not a pair of library and class"):
        capture(pipeline)


def test_the_trained_pipeline_is_captured(moving_digits: Path) -> None:
    program = capture(moving_digits)
    assert program.origin.class_name == "UNetSpatioTemporalConditionModel"
    assert program.entries["full"].inputs[0].shape[0] == 2
    assert program.has_values
