"""Caching engines in unmodified diffusers pipelines: what the same schedule gives with hooks on the eager model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optpass as library
from optpass.capture.sources import capture
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.folder import build_pipeline
from optpass.runtime.looped import LoopModule
from optpass.runtime.sampling import Asked, drive

Folder = Callable[[str], Path]
EVERY = 2
CUT = "up_blocks.0"
UNCACHED: dict[str, Any] = {"onnxruntime": {"threads": 1}}


def bundle(checkpoint: Path, out: Path, inputs: Any = None, **options: Any) -> Path:
    document = {"passes": [{"cache-features": {"cut": CUT, "every": EVERY, **options}}], "target": UNCACHED}
    recipe = make_recipe(document if inputs is None else {**document, "inputs": inputs})
    return apply(recipe, Request(str(checkpoint), out, baseline=False, verify="never", samples=0)).folder


@contextmanager
def hooks(unet: nn.Module, every: int = EVERY) -> Iterator[list[bool]]:
    """The oracle: the module at the cut gives, in all but every n-th call, what it gave before; tells what it did."""
    kept: list[Any] = []
    reused: list[bool] = []

    def exchange(_: nn.Module, __: Any, output: Any) -> Any:
        reused.append(len(reused) % every != 0)
        if not reused[-1]:
            kept[:] = [output]
        return kept[0]

    handle = unet.get_submodule(CUT).register_forward_hook(exchange)
    yield reused
    handle.remove()


SCHEDULERS = {
    "stable-diffusion": ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
    "stable-video-diffusion": ("EulerDiscreteScheduler",),
}


@pytest.fixture(scope="module")
def cached(pipeline_folder: Folder, asked_of: Callable[[str], Asked], tmp_path_factory: Any) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            call = asked_of(kind).call
            inputs = {"sample": [2, 3, 8, call["height"] // 2, call["width"] // 2]} if "video" in kind else None
            made[kind] = bundle(pipeline_folder(kind), tmp_path_factory.mktemp(kind) / "bundle", inputs)
        return made[kind]

    return make


@pytest.mark.parametrize(("kind", "scheduler"), [(kind, name) for kind, names in SCHEDULERS.items() for name in names])
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


def test_open_sizes_through_an_engine(pipeline_folder: Folder, tmp_path: Path) -> None:
    """One bundle, batches and resolutions that it was not captured at, changing in between."""
    from diffusers import UNet2DConditionModel

    folder = pipeline_folder("stable-diffusion") / "unet"
    found = library.load(bundle(folder, tmp_path / "bundle", OPEN))
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


def test_a_reuse_engine_is_the_full_one_given_the_same_feature(pipeline_folder: Folder, tmp_path: Path) -> None:
    folder = bundle(pipeline_folder("stable-diffusion") / "unet", tmp_path / "bundle")
    plain = tmp_path / "plain"
    recipe = make_recipe({"passes": [], "target": UNCACHED})
    apply(recipe, Request(str(pipeline_folder("stable-diffusion") / "unet"), plain, baseline=False, verify="never"))
    module, original = library.load(folder), library.load(plain)
    runners = module.runner.runners
    inputs = {spec.name: torch.randn(spec.shape).to(spec.dtype) for spec in original.inputs}
    inputs["timestep"] = torch.tensor(500, dtype=inputs["timestep"].dtype)
    full = runners["full"](inputs)
    reuse = runners["reuse"]({**inputs, "past.feature": full["present.feature"]})
    uncached = original.runner(inputs)["sample"]
    scale = float(uncached.abs().max())
    for value in (full["sample"], reuse["sample"]):
        torch.testing.assert_close(value, uncached, atol=1e-6 * scale, rtol=0)
    assert size(folder) <= 1.02 * size(plain) + len((folder / "reuse.onnx").read_bytes())


def size(folder: Path) -> int:
    """Bytes of a bundle's engines."""
    return sum(path.stat().st_size for path in folder.glob("*.onnx*"))


def test_moving_digits(moving_digits: Path, tmp_path: Path) -> None:
    """The trained checkpoint: equal clips, engines that share their weights, a tenth of the size at most on top."""
    from optpass.runtime.class_to_video import ClassToVideoPipeline

    inputs = {"sample": [2, 8, 4, 16, 16]}
    program = capture(moving_digits, inputs={"sample": (2, 8, 4, 16, 16)}, dtype=torch.float32)
    document = {"inputs": inputs, "dtype": "float32", "target": UNCACHED}
    request = {"baseline": False, "verify": "never", "samples": 0}
    plain = apply(make_recipe({**document, "passes": []}), Request(str(moving_digits), tmp_path / "a", **request))
    passes = [{"cache-features": {"cut": CUT, "every": EVERY}}]
    made = apply(make_recipe({**document, "passes": passes}), Request(str(moving_digits), tmp_path / "b", **request))
    assert size(made.folder) <= 1.02 * size(plain.folder)
    pipeline = ClassToVideoPipeline.load(moving_digits)
    with hooks(pipeline.unet):
        expected = frames(pipeline)
    pipeline.unet = library.load(made.folder)
    assert np.abs(frames(pipeline) - expected).max() < 1e-3
    assert program.loop is not None


def frames(pipeline: Any) -> Any:
    found: Tensor = pipeline([3], num_inference_steps=6).frames
    return found.numpy()
