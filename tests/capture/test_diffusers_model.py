"""Diffusers model folders: every family that optpass has inputs for, and everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from optpass.capture import inputs_diffusers
from optpass.capture.sources import capture
from optpass.errors import MissingValuesError, UserError, WeightError
from optpass.ir.dialect import verify_shapes
from optpass.ir.weights import Absent, Cast

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL_VIDEO = {
    "sample_size": 8,
    "num_frames": 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "num_attention_heads": (2, 4),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "transformer_layers_per_block": 1,
}
SMALL_TEXT = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL_XL = {
    **SMALL_TEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "video": ("UNetSpatioTemporalConditionModel", SMALL_VIDEO),
    "text": ("UNet2DConditionModel", SMALL_TEXT),
    "classes": ("UNet2DConditionModel", {**SMALL_TEXT, "num_class_embeds": 5}),
    "xl": ("UNet2DConditionModel", SMALL_XL),
    "dit": (
        "DiTTransformer2DModel",
        {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4,
         "out_channels": 8, "num_embeds_ada_norm": 10},
    ),
    "tiny-autoencoder": (
        "AutoencoderTiny",
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    ),
    "autoencoder": (
        "AutoencoderKL",
        {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4,
         "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True},
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
         "freq_dim": 16, "ffn_dim": 16, "num_layers": 1},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4,
         "out_channels": 4, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8,
         "pos_embed_max_size": 8},
    ),
}  # fmt: skip
SIZES = {
    "tiny-autoencoder": {"sample": [2, 3, 16, 8]},
    "flux": {"hidden_states": [2, 16, 4], "encoder_hidden_states": [2, 5, 12]},
    "wan": {"hidden_states": [1, 4, 3, 8, 6], "encoder_hidden_states": [1, 5, 8]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_computes_what_diffusers_computes(
    family: str, tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    name, config = FAMILIES[family]
    model = random_weights(getattr(diffusers, name)(**config))
    model.save_pretrained(tmp_path)
    program = capture(tmp_path, inputs=SIZES.get(family))
    verify_shapes(program)
    assert_same_function(program, model)
    assert program.origin.class_name == name
    assert program.has_values


def test_a_saved_unet_computes_what_diffusers_computes(
    unet_folder: Path, small_unet: Any, assert_same_function: Any
) -> None:
    assert_same_function(capture(unet_folder, inputs={"sample": [3, 2, 8, 16]}), small_unet)


def sizes_of(config: dict[str, Any], overrides: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    arguments = inputs_diffusers.unet_spatio_temporal(config).arguments(overrides, {}, torch.float32)
    return {name: tuple(value.shape) for name, value in arguments.arguments.items()}


def test_sizes_of_one_input_reach_the_others() -> None:
    assert sizes_of({**SMALL_VIDEO, "in_channels": 8}, {"sample": [3, 5, 8, 16, 8]}) == {
        "sample": (3, 5, 8, 16, 8),
        "timestep": (),
        "encoder_hidden_states": (3, 1, 16),
        "added_time_ids": (3, 3),
    }


def test_default_sizes_come_from_the_config() -> None:
    assert sizes_of({**SMALL_VIDEO, "in_channels": 8}, {})["sample"] == (1, 2, 8, 8, 8)
    uneven = {**SMALL_VIDEO, "in_channels": 4, "sample_size": [4, 6], "num_frames": None}
    assert sizes_of(uneven, {})["sample"] == (1, 14, 4, 4, 6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"smaple": [1, 2, 8, 8]}, "no input 'smaple'; did you mean 'sample'"),
        ({"sample": [1, 8, 8]}, r"has 4 dimensions \(batch, 2, height, width\); 3 sizes are given"),
        ({"sample": [1, 3, 8, 8]}, "fixed by the model's config"),
        ({"sample": [0, 2, 8, 8]}, "positive whole number"),
        ({"timestep": [1]}, "has no dimensions"),
    ],
)
def test_impossible_sizes_are_refused(unet_folder: Path, sizes: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        capture(unet_folder, inputs=sizes)


def test_inputs_that_disagree_are_refused(config_folder: Any) -> None:
    folder = config_folder({"_class_name": "UNet2DConditionModel", **SMALL_TEXT})
    with pytest.raises(UserError, match="'sample' and 'encoder_hidden_states' disagree on batch: 1 and 2"):
        capture(folder, inputs={"sample": [1, 4, 8, 8], "encoder_hidden_states": [2, 7, 12]})


def test_a_folder_without_weights_is_captured_without_values(unet_folder: Path) -> None:
    (unet_folder / "diffusion_pytorch_model.safetensors").unlink()
    program = capture(unet_folder)
    assert not program.has_values
    name = program.entries["full"].weight_names[0]
    assert isinstance(program.weights[name], Absent)
    with pytest.raises(MissingValuesError, match="captured structure-only"):
        program.weights[name].evaluate()


def test_structure_only_leaves_weights_alone(unet_folder: Path) -> None:
    (unet_folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not even looked at")
    assert not capture(unet_folder, structure_only=True).has_values


def test_a_bare_config_file_is_captured_without_values(unet_folder: Path) -> None:
    program = capture(unet_folder / "config.json")
    assert not program.has_values
    assert program.origin.class_name == "UNet2DModel"


def test_half_precision_weights_are_cast_when_read(
    unet_folder: Path, small_unet: Any, assert_same_function: Any
) -> None:
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(halves, unet_folder / "diffusion_pytorch_model.fp16.safetensors")
    program = capture(unet_folder, dtype=torch.float32)
    assert isinstance(program.weights["conv_in.weight"], Cast)
    assert program.weights["conv_in.weight"].dtype == torch.float32
    assert_same_function(program, small_unet, atol=5e-3)


def test_a_model_can_be_captured_in_half_precision(unet_folder: Path) -> None:
    program = capture(unet_folder, dtype=torch.bfloat16)
    assert program.weights["conv_in.weight"].dtype == torch.bfloat16
    assert program.entries["full"].inputs[0].dtype == torch.bfloat16


def test_an_unknown_class_is_refused_with_the_nearest(config_folder: Any) -> None:
    with pytest.raises(UserError, match="no model class 'UNet2DModle'; did you mean 'UNet2DModel'"):
        capture(config_folder({"_class_name": "UNet2DModle"}))


@pytest.mark.parametrize("name", ["DiffusionPipeline", "utils", "__class__", "os", "ModelMixin"])
def test_only_models_are_reached_by_class_name(config_folder: Any, name: str) -> None:
    with pytest.raises(UserError, match=r"no model class|is not a model"):
        capture(config_folder({"_class_name": name}))


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel", ', encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        capture(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match="expected a JSON object"):
        capture(tmp_path)


def test_a_config_that_builds_nothing_is_refused(config_folder: Any) -> None:
    with pytest.raises(UserError, match=r"does not build a UNet2DModel"):
        capture(config_folder({"_class_name": "UNet2DModel", "block_out_channels": [8]}))


def test_remote_code_is_refused(unet_folder: Path) -> None:
    config = json.loads((unet_folder / "config.json").read_text())
    (unet_folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(UserError, match="--trust-remote-code"):
        capture(unet_folder)


def test_remote_code_runs_when_it_is_trusted(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    code = (
        "from pathlib import Path\nfrom diffusers import UNet2DModel\n"
        f"Path({str(marker)!r}).touch()\nclass Mine(UNet2DModel):\n    pass\n"
    )
    (tmp_path / "model" / "code.py").write_text(code)
    config = {"_class_name": "Mine", "auto_map": {"AutoModel": "code.Mine"}, "sample_size": 8}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        capture(tmp_path / "model")
    assert not marker.exists()
    with pytest.raises(UserError, match="does not know the inputs of Mine"):
        capture(tmp_path / "model", trust_remote_code=True)
    assert marker.exists()


def test_missing_weights_are_named(unet_folder: Path) -> None:
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "conv_in.weight"}, path)
    with pytest.raises(WeightError, match=r"1 weights are missing from the checkpoint: conv_in\.weight"):
        capture(unet_folder)


def test_weights_of_another_shape_are_named(unet_folder: Path) -> None:
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_in.weight": torch.zeros(8, 3, 3, 3)}, path)
    with pytest.raises(
        WeightError, match=r"conv_in\.weight: the model has \[8, 2, 3, 3\], the checkpoint \[8, 3, 3, 3\]"
    ):
        capture(unet_folder)


def test_integer_weights_do_not_pass_for_floats(unet_folder: Path) -> None:
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_in.weight": torch.zeros(8, 2, 3, 3, dtype=torch.int8)}, path)
    with pytest.raises(WeightError, match=r"conv_in\.weight: the model has f32, the checkpoint i8"):
        capture(unet_folder)


def test_a_registered_builder_serves_a_new_family(config_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from optpass.capture import inputs

    monkeypatch.delitem(inputs.BUILDERS, "VQModel", raising=False)
    config = {"_class_name": "VQModel", "block_out_channels": [32], "sample_size": 8}
    folder = config_folder(config)
    with pytest.raises(UserError, match=r"does not know the inputs of VQModel: give the sizes of sample"):
        capture(folder)

    @inputs.input_builder("VQModel")
    def vq(config: Any) -> inputs.Inputs:
        return inputs.Inputs({"sample": inputs.Input(("batch", 3, 16, 16))}, {"batch": 2})

    try:
        assert capture(folder).entries["full"].inputs[0].shape == (2, 3, 16, 16)
    finally:
        del inputs.BUILDERS["VQModel"]


def test_given_sizes_serve_a_family_without_a_builder(config_folder: Any) -> None:
    folder = config_folder({"_class_name": "VQModel", "block_out_channels": [32], "sample_size": 8})
    assert capture(folder, inputs={"sample": [1, 3, 8, 8]}).entries["full"].inputs[0].shape == (1, 3, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "parameters"), [("svd-unet", 1_524_623_082), ("sd15-unet", 859_520_964)])
def test_full_size_models_are_captured_in_less_than_a_gigabyte(config: str, parameters: int) -> None:
    code = (
        "import resource\nfrom optpass.capture.sources import capture\n"
        f"program = capture({str(CONFIGS / config)!r})\n"
        "print(sum(w.numel for w in program.weights.values() if not w.has_values))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert int(shown[0]) == parameters
    assert int(shown[1]) < 1_000_000  # KiB
