"""timm model folders."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optpass.capture.sources import capture
from optpass.capture.timm_import import timm_importable
from optpass.errors import UserError, WeightError
from optpass.ir.dialect import verify_shapes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an optional extra")

VIT = {"img_size": [32, 48], "depth": 2, "embed_dim": 48, "num_heads": 3}
RESNET = {"layers": [1, 1, 1, 1]}
TNT = {"img_size": [32, 48], "depth": 1, "embed_dim": 24}
WEIGHTS = "model.safetensors"


def saved(name: str, folder: Path, random_weights: Any, **model_args: Any) -> Any:
    with timm_importable():
        import timm
    from timm.models import save_for_hf

    model = random_weights(timm.create_model(name, num_classes=5, **model_args))
    save_for_hf(model, folder, safe_serialization=True)
    return model


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("name", "model_args"), [("vit_tiny_patch16_224", VIT), ("resnet18", RESNET)])
def test_a_saved_model_computes_what_timm_computes(
    name: str, model_args: Any, tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    model = saved(name, tmp_path, random_weights, **model_args)
    program = capture(tmp_path)
    verify_shapes(program)
    assert_same_function(program, model)
    assert (program.origin.kind, program.origin.class_name) == ("timm", type(model).__name__)


def test_pickled_weights_are_read(tmp_path: Path, random_weights: Any, assert_same_function: Any) -> None:
    model = saved("vit_tiny_patch16_224", tmp_path, random_weights, **VIT)
    (tmp_path / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_function(capture(tmp_path), model)


def test_sizes_come_from_the_config_and_are_free_where_timm_says_so(tmp_path: Path, random_weights: Any) -> None:
    saved("resnet18", tmp_path, random_weights, **RESNET)
    assert capture(tmp_path).entries["full"].inputs[0].shape == (1, 3, 224, 224)
    assert capture(tmp_path, inputs={"x": [2, 3, 64, 96]}).entries["full"].outputs[0].shape == (2, 5)


def test_one_module_is_captured_alone(tmp_path: Path, random_weights: Any, assert_same_function: Any) -> None:
    model = saved("resnet18", tmp_path, random_weights, **RESNET)
    program = capture(tmp_path, component="layer2.0", inputs={"x": [2, 64, 6, 8]})
    assert_same_function(program, model.layer2[0])
    assert program.origin.kind == "module of timm"


def test_the_size_of_position_embeddings_is_fixed(tmp_path: Path, random_weights: Any) -> None:
    saved("vit_tiny_patch16_224", tmp_path, random_weights, **VIT)
    assert capture(tmp_path, inputs={"x": [2, 3, 32, 48]}).entries["full"].inputs[0].shape == (2, 3, 32, 48)
    with pytest.raises(UserError, match="fixed by the model's config"):
        capture(tmp_path, inputs={"x": [1, 3, 48, 32]})


@pytest.mark.parametrize("name", ["config.json", "renamed.json"])
def test_a_bare_config_is_captured_without_values(tmp_path: Path, random_weights: Any, name: str) -> None:
    saved("resnet18", tmp_path / "model", random_weights, **RESNET)
    (tmp_path / "model" / "config.json").rename(tmp_path / name)
    program = capture(tmp_path / name)
    assert not program.has_values
    assert program.entries["full"].outputs[0].shape == (1, 5)


def test_a_config_of_an_architecture_alone_is_enough(config_folder: Any) -> None:
    program = capture(config_folder({"architecture": "resnet18"}), inputs={"x": [1, 3, 32, 64]})
    assert sum(weight.numel for name, weight in program.weights.items() if "running" not in name) == 11_689_512


def as_first_published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TNT's names in its authors' checkpoint."""
    renamed = {}
    for name, tensor in weights.items():
        for new, old in {
            "norm_mlp_in": "inner_norm2",
            "norm_mlp": "outer_norm2",
            "norm1_proj": "proj_norm1",
            "norm2_proj": "proj_norm2",
            "pixel_embed": "patch_embed",
            "patch_pos": "outer_pos",
            "pixel_pos": "inner_pos",
            "attn_in": "inner_attn",
            "attn_out": "outer_attn",
            "norm_in": "inner_norm1",
            "norm_out": "outer_norm1",
            "mlp_in": "inner_mlp",
        }.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return {**renamed, "outer_tokens": torch.zeros(1)}


def test_names_of_an_older_checkpoint_become_the_modules(
    tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    model = saved("tnt_s_legacy_patch16_224", tmp_path, random_weights, **TNT)
    old = as_first_published(load_file(tmp_path / WEIGHTS))
    assert not {"patch_pos", "pixel_pos"} & old.keys()
    save_file(old, tmp_path / WEIGHTS)
    assert_same_function(capture(tmp_path), model)


def test_weights_that_timm_computes_when_it_loads_are_refused(tmp_path: Path, random_weights: Any) -> None:
    saved("tnt_s_patch16_224", tmp_path, random_weights, **TNT)
    old = as_first_published(load_file(tmp_path / WEIGHTS))
    save_file({**old, "inner_pos": torch.zeros(1, 16, old["inner_pos"].shape[1])}, tmp_path / WEIGHTS)
    with pytest.raises(WeightError, match=r"timm computes 'pixel_pos' from other tensors .*save_for_hf"):
        capture(tmp_path)


def test_missing_weights_are_named(tmp_path: Path, random_weights: Any) -> None:
    saved("vit_tiny_patch16_224", tmp_path, random_weights, **VIT)
    kept = {name: tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if "head" not in name}
    save_file(kept, tmp_path / WEIGHTS)
    with pytest.raises(WeightError, match=r"2 weights are missing from the checkpoint: head\.\w+, head"):
        capture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet81"}, r"config\.json: timm has no architecture 'resnet81'; did you mean 'resnet"),
        ({"architecture": 3}, "timm has no architecture 3"),
        ({"architecture": "hf-hub:timm/resnet18"}, "timm has no architecture"),
        ({"model_args": {"layers": "many"}}, "does not build a resnet18"),
        ({"model_args": {"no_such_argument": 1}}, "does not build a resnet18.*no_such_argument"),
        ({"pretrained_cfg": 3}, "does not build a resnet18"),
    ],
)
def test_a_config_that_builds_nothing_is_refused(
    tmp_path: Path, random_weights: Any, changes: dict[str, Any], message: str
) -> None:
    saved("resnet18", tmp_path, random_weights, **RESNET)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        capture(tmp_path)


def test_without_timm_the_extra_is_named(tmp_path: Path, random_weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("resnet18", tmp_path, random_weights, **RESNET)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"is a timm model, and timm is not installed: pip install 'optpass\[timm\]'"):
        capture(tmp_path)


def test_a_factory_gives_timms_models_too(tmp_path: Path, random_weights: Any, assert_same_function: Any) -> None:
    model = saved("vit_tiny_patch16_224", tmp_path, random_weights, **VIT)
    code = f"import timm\n\ndef vit():\n    return timm.create_model('vit_tiny_patch16_224', num_classes=5, **{VIT})\n"
    (tmp_path / "net.py").write_text(code)
    program = capture(f"{tmp_path / 'net.py'}:vit", weights=tmp_path / WEIGHTS)
    assert program.entries["full"].inputs[0].shape == (1, 3, 32, 48)
    assert_same_function(program, model)
