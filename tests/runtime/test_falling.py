"""A trained adapter on the trained checkpoint: merged, kept and refitted engines make the same clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optpass.capture.sources import capture
from optpass.evaluate.quality import psnr
from optpass.passes.merge_lora import MergeLora
from optpass.pipeline.apply import apply
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step, make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.class_to_video import ClassToVideoPipeline
from optpass.runtime.loading import load
from optpass.runtime.refit import refit

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
DIGITS, FALLING = CHECKPOINTS / "moving-digits", CHECKPOINTS / "moving-digits-falling"


def build(out: Path, **options: Any) -> Path:
    merging = {"adapter": str(FALLING), **options}
    recipe = make_recipe({"passes": [{"merge-lora": merging}], "target": "onnxruntime"})
    apply(recipe, Request(str(DIGITS), out, verify="never", baseline=False, samples=0))
    return out


def clips(bundle: Path | None) -> Tensor:
    unet = load(bundle) if bundle else None
    frames: Tensor = ClassToVideoPipeline.load(DIGITS, unet=unet)([4], num_inference_steps=6, seed=5).frames
    return frames


def test_every_layer_of_the_adapter_is_a_site():
    program = capture(str(DIGITS), structure_only=True)
    _, record = run_pass(program, Step("merge-lora", MergeLora(adapter=FALLING)))
    assert len(record.sites) == 185
    assert not record.declined


@pytest.mark.slow
def test_merged_kept_and_refitted_make_the_same_clips(tmp_path: Path) -> None:
    merged = clips(build(tmp_path / "merge"))
    kept = build(tmp_path / "keep", mode="keep")
    refitted = build(tmp_path / "refit", mode="refit", scale=0.0)
    plain = clips(refitted)
    assert psnr(plain, clips(None)) > 60
    assert psnr(plain, merged) < 25
    refit(refitted, [(FALLING, 1.0)])
    assert psnr(clips(kept), merged) >= 40
    assert torch.equal(clips(refitted), merged)
    refit(kept, [])
    assert psnr(clips(kept), plain) >= 40
