"""Whole pipelines on engines: diffusers' own classes, unmodified, make the picture that they made before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optpass as library
from optpass.errors import UserError
from optpass.runtime.folder import build_pipeline
from optpass.runtime.module import EngineModule
from optpass.runtime.sampling import drive

COMPONENTS = {
    "stable-diffusion": {"unet": ["full"], "text_encoder": ["full"], "vae": ["decode"]},
    "stable-diffusion-tiny": {"unet": ["full"], "text_encoder": ["full"], "vae": ["decode"]},
    "stable-diffusion-xl": {"unet": ["full"], "text_encoder": ["full"], "text_encoder_2": ["full"], "vae": ["decode"]},
    "dit": {"transformer": ["full"], "vae": ["decode"]},
    "stable-video-diffusion": {"unet": ["full"], "image_encoder": ["full"], "vae": ["encode", "decode"]},
    "flux": {"transformer": ["full"], "text_encoder": ["full"], "text_encoder_2": ["full"], "vae": ["decode"]},
}


ENGINES = ("stable-diffusion", "flux")
"""The kinds that go through ONNX Runtime; the others show the same of the pipeline in less time."""


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, "onnxruntime" if kind in ENGINES else "program") for kind in COMPONENTS]
)
def test_the_picture_is_the_originals(kind: str, target: str, case: Callable[..., Any]) -> None:
    made = case(kind, target)
    assert {
        item["checkpoint"]["component"]: [engine["entry"] for engine in item["engines"]]
        for item in made.report["components"]
    } == COMPONENTS[kind]
    pipeline = library.load_pipeline(made.bundle)
    # The first seed twice over would hide a picture that is the same whatever is asked.
    found = drive(pipeline, samples=2, asked=made.asked, seed=3).frames
    expected = drive(build_pipeline(made.folder, {}), samples=2, asked=made.asked, seed=3).frames
    assert all(isinstance(getattr(pipeline, name), EngineModule) for name in COMPONENTS[kind])
    assert float(expected.std()) > 0.05
    assert float((expected[0] - expected[1]).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_bundle_needs_nothing_of_the_checkpoint(case: Callable[..., Any], tmp_path: Path) -> None:
    made = case("stable-diffusion", "onnxruntime")
    files = sorted(path.relative_to(made.bundle).as_posix() for path in made.bundle.rglob("*") if path.is_file())
    assert "components/tokenizer/tokenizer.json" in files
    assert "components/unet/config.json" in files
    assert not [name for name in files if name.startswith("components/") and name.endswith(".safetensors")]
    moved = shutil.copytree(made.bundle, tmp_path / "moved")
    assert type(library.load_pipeline(moved)).__name__ == "StableDiffusionPipeline"


def test_the_page_has_a_row_for_every_component(case: Callable[..., Any]) -> None:
    page = (case("stable-diffusion", "onnxruntime").bundle / "report.html").read_text("utf-8")
    table = page[page.index("By component") :]
    assert all(name in table for name in ("UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"))


def test_a_changed_engine_of_any_component_is_refused(case: Callable[..., Any], tmp_path: Path) -> None:
    made = case("stable-diffusion", "onnxruntime")
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    with (bundle / "vae" / "decode.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"vae/decode\.onnx is not the file"):
        library.load_pipeline(bundle)


def test_a_component_is_loaded_alone(case: Callable[..., Any]) -> None:
    from diffusers import AutoencoderKL

    made = case("stable-diffusion", "onnxruntime")
    vae = library.load(made.bundle, component="vae")
    original = AutoencoderKL.from_pretrained(made.folder / "vae").eval()
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator()
    with torch.no_grad():
        expected = original.decode(latents).sample
    torch.testing.assert_close(vae.decode(latents).sample, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vae.decode(latents, return_dict=False, generator=generator)[0], expected)
    assert vae.config.scaling_factor == original.config.scaling_factor
    assert vae.config.block_out_channels == [8, 8]
    with pytest.raises(UserError, match="this engine has decode of AutoencoderKL, not its forward"):
        vae(latents)
    with pytest.raises(AttributeError, match="encode is not in the engine"):
        vae.encode(latents)
    with pytest.raises(UserError, match="no engine of 'vea'; did you mean 'vae'"):
        library.load(made.bundle, component="vea")
    assert library.load(made.bundle).inputs[0].shape == (2, 4, 12, 12)


def test_methods_share_weights_and_keep_the_posterior(case: Callable[..., Any]) -> None:
    from diffusers import AutoencoderKLTemporalDecoder

    made = case("stable-video-diffusion")
    vae = library.load(made.bundle, component="vae")
    original = AutoencoderKLTemporalDecoder.from_pretrained(made.folder / "vae").eval()
    image = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = original.encode(image).latent_dist
    found = vae.encode(image).latent_dist
    torch.testing.assert_close(found.mode(), expected.mode())
    draws = [each.sample(torch.Generator().manual_seed(5)) for each in (found, expected)]
    torch.testing.assert_close(*draws)


def test_run_writes_pictures_from_a_prompt(case: Callable[..., Any], optpass: Any, tmp_path: Path) -> None:
    made = case("stable-diffusion", "onnxruntime")
    arguments = ("--samples", 2, "--steps", 3, "--seed", 7, "-o", tmp_path / "out", "--json")
    outcome = optpass("run", made.bundle, "--prompt", "a dog", "--guidance", 4, *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.json["guidance"] == 4
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["image-000.png", "image-001.png", "samples.npz"]
    frames = np.load(tmp_path / "out" / "samples.npz")["frames"]
    assert frames.shape == (2, 1, 3, 24, 24)

    from PIL import Image

    pipeline = build_pipeline(made.folder, {})
    generator = torch.Generator().manual_seed(8)
    expected = pipeline("a dog", num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    found = np.asarray(Image.open(tmp_path / "out" / "image-001.png")).astype(int)
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


def test_run_writes_clips_from_an_image(case: Callable[..., Any], optpass: Any, tmp_path: Path) -> None:
    made = case("stable-video-diffusion")
    made.asked.image.save(tmp_path / "start.png")
    outcome = optpass(
        "run",
        made.bundle,
        "--image",
        tmp_path / "start.png",
        "--samples",
        1,
        "--steps",
        2,
        "-o",
        tmp_path / "o",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["clip-000.webp", "samples.npz"]
    assert np.load(tmp_path / "o" / "samples.npz")["frames"].shape == (1, 3, 3, 16, 24)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("stable-diffusion-tiny", (), "a StableDiffusionPipeline needs --prompt"),
        ("stable-diffusion-tiny", ("--prompt", "a", "--image", "no.png"), "--image no.png: not a readable image"),
        ("stable-video-diffusion", (), "a StableVideoDiffusionPipeline needs --image"),
        ("dit", ("--prompt", "a"), "--prompt: the call of a DiTPipeline takes no prompt"),
        ("dit", ("--guidance", "1"), "input 'hidden_states' has the shape"),
    ],
)
def test_what_run_cannot_do_is_said(
    kind: str, options: tuple[str, ...], message: str, case: Callable[..., Any], optpass: Any
) -> None:
    outcome = optpass("run", case(kind).bundle, *options, "--samples", 1, "--steps", 2)
    assert outcome.code == 2
    assert message in outcome.err


def test_an_old_bundle_loads(case: Callable[..., Any], tmp_path: Path) -> None:
    """Bundles of schema 1 had one Program, whose files lay beside the manifest."""
    made = case("dit")
    bundle = tmp_path / "old"
    shutil.copytree(made.bundle / "transformer", bundle)
    data = json.loads((made.bundle / "manifest.json").read_text())
    files = {
        name.removeprefix("transformer/"): record
        for name, record in data["files"].items()
        if name.startswith("transformer/")
    }
    for key in ("parts", "folder", "call"):
        del data[key]
    (bundle / "manifest.json").write_text(json.dumps({**data, "schema_version": 1, "components": None, "files": files}))
    assert library.load(bundle).inputs[0].name == "hidden_states"
    with pytest.raises(UserError, match="holds a model and no pipeline"):
        library.load_pipeline(bundle)
