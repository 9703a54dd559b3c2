"""One adapter for several components of a pipeline, exchanged in the bundle; diffusers' own loader is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import optpass as library
from optpass.errors import UserError, WeightError
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.bundle import read_manifest
from optpass.runtime.folder import build_pipeline
from optpass.runtime.refit import refit
from optpass.runtime.sampling import Asked, drive

RANK = 2
ENDS = ("to_q.weight", "to_v.weight", "ff.net.2.weight", "conv1.weight", "q_proj.weight", "fc1.weight")


def adapter(pipeline: Any, path: Path, seed: int) -> Path:
    """A LoRA of both models in diffusers' layout, its factors random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for component in ("unet", "text_encoder"):
        for name, value in getattr(pipeline, component).named_parameters():
            if name.endswith(ENDS):
                key = f"{component}.{name.removesuffix('.weight')}"
                out, *rest = value.shape
                down = torch.randn(RANK, *rest, generator=generator) / 3
                tensors[f"{key}.lora_A.weight"] = down
                tensors[f"{key}.lora_B.weight"] = (
                    torch.randn(out, RANK, *(1 for _ in rest[1:]), generator=generator) / 3
                )
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def bundle(case: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline's folder, and a bundle of it with an adapter in two components."""
    folder = case("stable-diffusion", "onnxruntime").folder
    place = tmp_path_factory.mktemp("adapters")
    first = adapter(build_pipeline(folder, {}), place / "first.safetensors", 1)
    merging = {"passes": [{"merge-lora": {"adapter": str(first), "mode": "refit"}}]}
    document = {"components": {"unet": merging, "text_encoder": merging, "vae": "keep"}, "target": "onnxruntime"}
    apply(make_recipe(document), Request(str(folder), place / "bundle", baseline=False, samples=0))
    return folder, place / "bundle"


def picture(pipeline: Any) -> torch.Tensor:
    frames: torch.Tensor = drive(pipeline, samples=1, asked=Asked(prompt="a cat", steps=3), seed=3).frames
    return frames


def test_refitted_pipelines_are_diffusers_own(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    folder, built = bundle
    second = adapter(build_pipeline(folder, {}), tmp_path / "second.safetensors", 2)
    done = refit(built, [(second, 0.7)], out=tmp_path / "refitted")
    parts = {part.component for part in read_manifest(built).all_parts() if part.refit}
    assert parts == {"unet", "text_encoder"}
    assert [key for key, _ in done.left_out] == ["second.safetensors"]  # no alpha, which is said
    expected = StableDiffusionPipeline.from_pretrained(folder)
    expected.load_lora_weights(second)
    expected.fuse_lora(lora_scale=0.7)
    expected.unload_lora_weights()
    found = picture(library.load_pipeline(tmp_path / "refitted"))
    torch.testing.assert_close(found, picture(expected), atol=1e-4, rtol=0)
    assert float((found - picture(build_pipeline(folder, {}))).abs().max()) > 1e-2


def test_one_component_alone_and_one_without_slots(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    _, built = bundle
    done = refit(built, [], component="text_encoder", out=tmp_path / "copy")
    assert done.tensors > 0
    before, after = read_manifest(built).files, read_manifest(tmp_path / "copy").files
    changed = {name for name, record in after.items() if record != before[name]}
    assert changed == {"text_encoder/full.onnx.slots.data", "text_encoder/refit/slots.json"}
    with pytest.raises(UserError, match="'vae'"):
        refit(built, [], component="vae")


def only(component: str, adapter: Path, path: Path, factor: float = 1.0) -> Path:
    """One component's part of ``adapter``; the others' with their factors multiplied."""
    tensors = load_file(adapter)
    kept = {key: value for key, value in tensors.items() if key.startswith(component)}
    changed = {key: value * factor for key, value in tensors.items() if key not in kept} if factor != 1.0 else {}
    save_file({**kept, **changed}, path)
    return path


def test_an_adapter_of_one_component_takes_the_old_one_out_of_the_other(
    bundle: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, built = bundle
    second = adapter(build_pipeline(folder, {}), tmp_path / "second.safetensors", 2)
    unet, text = (only(name, second, tmp_path / f"{name}.safetensors") for name in ("unet", "text_encoder"))
    refit(built, [(second, 1.0)], out=tmp_path / "both")
    refit(built, [(unet, 1.0), (text, 1.0)], out=tmp_path / "halves")
    refit(built, [(unet, 1.0)], out=tmp_path / "unet")
    refit(built, [], out=tmp_path / "base")
    places = ("unet/full.onnx.slots.data", "text_encoder/full.onnx.slots.data")
    made = {name: [(tmp_path / name / at).read_bytes() for at in places] for name in ("both", "halves", "unet", "base")}
    assert made["both"] == made["halves"]
    assert made["unet"] == [made["both"][0], made["base"][1]]
    assert made["base"][0] != made["both"][0]
    with pytest.raises(UserError, match="text_encoder"):
        refit(built, [(text, 1.0)], component="unet")


def test_no_part_changes_where_another_fails(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    folder, built = bundle
    second = adapter(build_pipeline(folder, {}), tmp_path / "second.safetensors", 2)
    overflowing = only("unet", second, tmp_path / "bad.safetensors", factor=1e30)
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    with pytest.raises(WeightError, match="NaN or Inf"):
        refit(built, [(overflowing, 1.0)])
    assert {path: path.read_bytes() for path in built.rglob("*") if path.is_file()} == before


def test_keys_of_components_that_are_carried(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    """The file that an engine of the denoiser alone was built with fits it again."""
    folder, _ = bundle
    first = adapter(build_pipeline(folder, {}), tmp_path / "first.safetensors", 1)
    document = {"passes": [{"merge-lora": {"adapter": str(first), "mode": "refit"}}], "target": "onnxruntime"}
    apply(make_recipe(document), Request(str(folder), tmp_path / "unet", baseline=False, samples=0))
    before = (tmp_path / "unet" / "full.onnx.slots.data").read_bytes()
    done = refit(tmp_path / "unet", [(first, 1.0)])
    assert (tmp_path / "unet" / "full.onnx.slots.data").read_bytes() == before
    assert any("text_encoder" in reason for _, reason in done.left_out)
