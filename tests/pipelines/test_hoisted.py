"""Hoisted engines in unmodified pipelines: what eager gives, whatever the order of prompts and generations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import optpass as library
from optpass.evaluate.difference import tensor_difference
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked, drive

Folder = Callable[[str], Path]
STEPS = 3
SIZES: dict[str, dict[str, list[int]]] = {
    "dit": {"hidden_states": [2, 4, 8, 8]},
    "stable-diffusion": {"sample": [2, 4, 12, 12], "encoder_hidden_states": [2, 16, 16]},
}


def bundle(checkpoint: Path, out: Path, *passes: Any, **document: Any) -> Path:
    """One engine of ONNX Runtime for each entry."""
    recipe = make_recipe({"passes": list(passes), "target": {"onnxruntime": {"threads": 1}}, **document})
    return apply(recipe, Request(str(checkpoint), out, baseline=False, verify="never", samples=0)).folder


@pytest.mark.parametrize("kind", ["dit", "stable-diffusion"])
def test_generations_are_what_eager_gives(
    kind: str, pipeline_folder: Folder, asked_of: Callable[[str], Asked], tmp_path: Path
) -> None:
    folder, asked = pipeline_folder(kind), asked_of(kind)
    component = "transformer" if kind == "dit" else "unet"
    eager = build_pipeline(folder, {})
    hoisted = build_pipeline(folder, {})
    module = library.load(bundle(folder, tmp_path / "out", "hoist-invariants", inputs=SIZES[kind]))
    setattr(hoisted, component, module)
    for seed, prompt in enumerate((asked.prompt, asked.prompt and "a dog", asked.prompt)):
        given = Asked(prompt, (seed + 1,), None, STEPS, call=asked.call)
        expected, found = (drive(pipe, samples=1, asked=given, seed=seed).frames for pipe in (eager, hoisted))
        assert tensor_difference(expected, found).relative_error <= 1e-4
    times = hoisted.scheduler.timesteps.tolist()
    assert module.statistics["full"] == 3 * len(times)
    assert module.statistics["prepare"] == 3
    # A row for each timestep, and where classes are part of it, for each of these.
    assert module.statistics["embed"] == len(set(times)) * (3 if kind == "dit" else 1)


@pytest.mark.slow
def test_the_same_video_to_the_bit(moving_digits: Path, tmp_path: Path) -> None:
    from optpass.runtime.class_to_video import ClassToVideoPipeline

    def clips(*passes: Any) -> Tensor:
        place = bundle(moving_digits, tmp_path / f"with-{len(passes)}", *passes, dtype="float32")
        pipe = ClassToVideoPipeline.load(moving_digits, unet=library.load(place))
        return torch.cat([pipe([label], num_inference_steps=8, seed=label).frames for label in (3, 5)])

    assert torch.equal(clips(), clips("hoist-invariants"))
