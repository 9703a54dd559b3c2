"""Transformers model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optpass.capture.sources import capture
from optpass.errors import UserError, WeightError
from optpass.ir.dialect import verify_shapes

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SMALL, "image_size": 16, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 49}
CLIP = {
    "text_config": TEXT,
    "vision_config": {**SMALL, "image_size": 16, "patch_size": 4},
    "projection_dim": 8,
}
FAMILIES: dict[str, tuple[str, Any]] = {
    "vit": ("ViTForImageClassification", lambda: transformers.ViTConfig(**VIT, num_labels=3)),
    "clip-text": ("CLIPTextModel", lambda: transformers.CLIPTextConfig(**TEXT)),
    "clip-text-projected": ("CLIPTextModelWithProjection", lambda: transformers.CLIPTextConfig(**TEXT)),
    "clip-vision": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**CLIP["vision_config"])),
    "clip": ("CLIPModel", lambda: transformers.CLIPConfig(**CLIP)),
    "resnet": (
        "ResNetForImageClassification",
        lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, image_size=32
        ),
    ),
    "dinov2": ("Dinov2Model", lambda: transformers.Dinov2Config(**{**VIT, "mlp_ratio": 2})),
    "videomae": (
        "VideoMAEModel",
        lambda: transformers.VideoMAEConfig(**VIT, num_frames=4, tubelet_size=2),
    ),
    "convnext": (
        "ConvNextModel",
        lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    ),
}


def saved(family: str, folder: Path, random_weights: Any) -> Any:
    name, config = FAMILIES[family]
    model = random_weights(getattr(transformers, name)(config()))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_computes_what_transformers_computes(
    family: str, tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    model = saved(family, tmp_path, random_weights)
    program = capture(tmp_path)
    verify_shapes(program)
    assert_same_function(program, model)
    assert program.origin.library == "transformers"
    assert program.origin.class_name == FAMILIES[family][0]


def test_running_statistics_come_from_the_checkpoint(tmp_path: Path, random_weights: Any) -> None:
    model = saved("resnet", tmp_path, random_weights)
    program = capture(tmp_path)
    name = next(name for name in program.weights if name.endswith("running_var"))
    assert torch.equal(program.weights[name].evaluate(), dict(model.named_buffers())[name])


def test_running_statistics_of_a_structure_have_no_values(tmp_path: Path, random_weights: Any) -> None:
    saved("resnet", tmp_path, random_weights)
    program = capture(tmp_path, structure_only=True)
    assert not any(expression.has_values for expression in program.weights.values())


def test_position_ids_come_from_the_code(tmp_path: Path, random_weights: Any) -> None:
    saved("clip-text", tmp_path, random_weights)
    path = tmp_path / "model.safetensors"
    stale = load_file(path)
    prefix = next(iter(stale)).partition("embeddings")[0]
    save_file({**stale, f"{prefix}embeddings.position_ids": torch.zeros(1, 9, dtype=torch.int64)}, path)
    program = capture(tmp_path)
    ids = next(expression for name, expression in program.weights.items() if name.endswith("position_ids"))
    assert ids.evaluate().tolist() == [list(range(9))]


def test_a_base_models_weights_serve_the_model_with_a_head(tmp_path: Path, random_weights: Any) -> None:
    saved("vit", tmp_path, random_weights)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("vit."): tensor for name, tensor in load_file(path).items()}, path)
    assert capture(tmp_path).has_values


def test_the_config_alone_is_captured_without_values(tmp_path: Path, random_weights: Any) -> None:
    saved("vit", tmp_path, random_weights)
    (tmp_path / "model.safetensors").unlink()
    assert not capture(tmp_path).has_values
    assert not capture(tmp_path / "config.json").has_values


def test_sizes_are_the_users(tmp_path: Path, random_weights: Any) -> None:
    saved("clip", tmp_path, random_weights)
    specs = capture(tmp_path, inputs={"input_ids": [3, 7]}).entries["full"].inputs
    assert {spec.name: spec.shape for spec in specs} == {"input_ids": (3, 7), "pixel_values": (3, 3, 16, 16)}


def test_pickled_weights_are_read(tmp_path: Path, random_weights: Any, assert_same_function: Any) -> None:
    model = saved("vit", tmp_path, random_weights)
    path = tmp_path / "model.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    assert_same_function(capture(tmp_path), model)


def test_missing_weights_are_named(tmp_path: Path, random_weights: Any) -> None:
    saved("vit", tmp_path, random_weights)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}, path)
    with pytest.raises(WeightError, match=r"2 weights are missing from the checkpoint: classifier\.\w+, classifier"):
        capture(tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_remote_code_is_refused(tmp_path: Path, random_weights: Any, marker: Path) -> None:
    saved("vit", tmp_path, random_weights)
    (tmp_path / "code.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    edit(tmp_path, auto_map={"AutoModel": "code.Model"}, model_type="mine")
    with pytest.raises(UserError, match="--trust-remote-code"):
        capture(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vitt"}, "no model_type 'vitt'; did you mean 'vit'"),
        (
            {"architectures": ["ViTForImageClasification"]},
            "no model class .*; did you mean 'ViTForImageClassification'",
        ),
        ({"architectures": ["logging"]}, "no model class 'logging'"),
        ({"hidden_act": "no-such-act"}, "does not build"),
        ({"hidden_size": "wide"}, "is no valid vit config|does not build"),
    ],
)
def test_a_config_that_builds_nothing_is_refused(
    tmp_path: Path, random_weights: Any, changes: dict[str, Any], message: str
) -> None:
    saved("vit", tmp_path, random_weights)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        capture(tmp_path)
