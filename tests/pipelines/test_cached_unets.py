"""Caching engines in unmodified diffusers pipelines: what the same schedule gives with hooks on the eager model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optpass as library
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.folder import build_pipeline
from optpass.runtime.looped import LoopModule
from optpass.runtime.sampling import Asked, drive

Folder = Callable[[str], Path]
EVERY = 2
CUT = "up_blocks.0"
TARGETS: dict[str, Any] = {"onnxruntime": {"onnxruntime": {"threads": 1}}, "program": "program"}


def bundle(checkpoint: Path, out: Path, cut: str = CUT, target: str = "onnxruntime", **document: Any) -> Path:
    """What `optpass apply` makes of ``checkpoint`` with every second step cached."""
    passes = [{"cache-features": {"cut": cut, "every": EVERY}}]
    recipe = make_recipe({"passes": passes, "target": TARGETS[target], **document})
    return apply(recipe, Request(str(checkpoint), out, baseline=False, verify="never", samples=0)).folder


@contextmanager
def hooks(unet: nn.Module, cut: str = CUT) -> Iterator[list[bool]]:
    """The oracle: the module at the cut gives, in every second call, what it gave before; tells what it did."""
    kept: list[Any] = []
    reused: list[bool] = []

    def exchange(_: nn.Module, __: Any, output: Any) -> Any:
        reused.append(len(reused) % EVERY != 0)
        if not reused[-1]:
            kept[:] = [output]
        return kept[0]

    handle = unet.get_submodule(cut).register_forward_hook(exchange)
    yield reused
    handle.remove()


@dataclass(frozen=True)
class Kind:
    """The target, sizes that the pipeline's call makes, and the schedulers that are tried."""

    target: str
    inputs: dict[str, list[int]]
    schedulers: tuple[str, ...]


KINDS = {
    "stable-diffusion": Kind(
        "onnxruntime",
        {"encoder_hidden_states": [2, 16, 16]},
        ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
    ),
    "stable-video-diffusion": Kind("program", {"sample": [2, 3, 8, 8, 12]}, ("EulerDiscreteScheduler",)),
}


@pytest.fixture(name="cached", scope="module")
def _cached(pipeline_folder: Folder, tmp_path_factory: Any) -> Callable[[str], Path]:
    @functools.cache
    def make(name: str) -> Path:
        kind = KINDS[name]
        out = tmp_path_factory.mktemp(name) / "bundle"
        return bundle(pipeline_folder(name), out, target=kind.target, inputs=kind.inputs)

    return make


@pytest.mark.parametrize(
    ("kind", "scheduler"), [(name, each) for name, kind in KINDS.items() for each in kind.schedulers]
)
def test_a_pipeline_makes_what_hooks_make(
    kind: str,
    scheduler: str,
    cached: Callable[[str], Path],
    pipeline_folder: Folder,
    asked_of: Callable[[str], Asked],
) -> None:
    import diffusers

    pipeline, asked = build_pipeline(pipeline_folder(kind), {}), asked_of(kind)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    plain = drive(pipeline, samples=1, asked=asked, seed=3).frames
    with hooks(pipeline.unet) as reused:
        expected = drive(pipeline, samples=1, asked=asked, seed=3).frames
    pipeline.unet = library.load(cached(kind))
    assert isinstance(pipeline.unet, LoopModule)
    found = [drive(pipeline, samples=1, asked=asked, seed=3).frames for _ in range(2)]
    assert pipeline.unet.statistics == {"full": 2 * reused.count(False), "reuse": 2 * reused.count(True)}
    assert float((plain - expected).abs().max()) > 1e-2
    for frames in found:
        torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)


OPEN = {"sample": ["1..4", 4, "8..24", "8..24"], "encoder_hidden_states": ["1..4", 7, 16]}


@pytest.mark.slow
def test_open_sizes_through_an_engine(pipeline_folder: Folder, tmp_path: Path) -> None:
    """One bundle, batches and resolutions that it was not captured at, changing in between."""
    from diffusers import UNet2DConditionModel

    folder = pipeline_folder("stable-diffusion") / "unet"
    found = library.load(bundle(folder, tmp_path / "bundle", inputs=OPEN))
    unet = UNet2DConditionModel.from_pretrained(folder).eval()
    for shape in ((1, 4, 8, 12), (3, 4, 16, 10), (1, 4, 8, 12)):
        generator = torch.Generator().manual_seed(len(shape) + shape[0])
        sample = torch.randn(shape, generator=generator)
        context = torch.randn(shape[0], 7, 16, generator=generator)
        with hooks(unet), torch.no_grad():
            for step in range(4):
                inputs = (sample, torch.tensor(900 - 200 * step), context)
                expected = unet(*inputs).sample
                torch.testing.assert_close(found(*inputs).sample, expected, atol=1e-4, rtol=1e-4)
                sample = sample - 0.05 * expected


def test_a_reuse_engine_is_the_full_one_given_the_same_feature(
    cached: Callable[[str], Path], pipeline_folder: Folder
) -> None:
    from diffusers import UNet2DConditionModel

    module = library.load(cached("stable-diffusion"))
    assert isinstance(module, LoopModule)
    generator = torch.Generator().manual_seed(4)
    inputs = {spec.name: torch.randn(spec.at({}).shape, generator=generator).to(spec.dtype) for spec in module.inputs}
    inputs["timestep"] = torch.full_like(inputs["timestep"], 500)
    engines = module.runner.runners
    full = engines["full"](inputs)
    reuse = engines["reuse"]({**inputs, "past.feature": full["present.feature"]})
    scale = float(full["sample"].abs().max())
    torch.testing.assert_close(reuse["sample"], full["sample"], atol=1e-6 * scale, rtol=0)
    unet = UNet2DConditionModel.from_pretrained(pipeline_folder("stable-diffusion") / "unet").eval()
    with torch.no_grad():
        expected = unet(**inputs).sample
    torch.testing.assert_close(full["sample"], expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.slow
def test_moving_digits_through_engines(moving_digits: Path, tmp_path: Path) -> None:
    """The trained checkpoint: the hooks' clip, and two engines in the space of one."""
    from optpass.runtime.class_to_video import ClassToVideoPipeline

    cut = "up_blocks.1"
    folder = bundle(moving_digits, tmp_path / "out", cut, inputs={"sample": [2, 8, 4, 16, 16]}, dtype="float32")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.onnx*")}
    assert sum(sizes.values()) <= 1.02 * (sizes["full.onnx"] + sizes["weights.onnx.data"])
    pipeline = ClassToVideoPipeline.load(moving_digits)
    with hooks(pipeline.unet, cut):
        expected = pipeline([3], num_inference_steps=6).frames
    pipeline.unet = library.load(folder)
    torch.testing.assert_close(pipeline([3], num_inference_steps=6).frames, expected, atol=1e-3, rtol=0)
