"""The road of the README on the trained checkpoint: apply, run, compare, and the engine inside the pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import optpass as library

SAMPLES = 4


@pytest.fixture(scope="module")
def applied(request, tmp_path_factory):
    """The demo's bundle, made once, and what ``apply --json`` printed."""
    from optpass.pipeline.apply import apply
    from optpass.pipeline.recipe import find_recipe, load_recipe
    from optpass.pipeline.request import Request

    checkpoint = request.getfixturevalue("moving_digits")
    out = tmp_path_factory.mktemp("digits") / "bundle"
    recipe = load_recipe(find_recipe("moving-digits"))
    return apply(recipe, Request(str(checkpoint), out, samples=SAMPLES))


def test_the_pass_is_exact_on_real_weights(applied):
    [item] = applied.report["passes"]
    # Three resolutions with spatial and temporal attention each, the middle block, and the way up.
    assert item["modified"]
    assert item["sites"] >= 6
    assert item["difference"]["relative_error"] <= 1e-5
    assert item["verified"].startswith("held")
    before, after = item["before"]["totals"], item["after"]["totals"]
    assert after["parameters"] < before["parameters"]
    assert after["macs"] < before["macs"]


def test_the_video_is_the_same_and_the_digits_read_the_same(applied):
    samples = applied.report["samples"]
    assert samples["psnr"] >= 40
    before, after = samples["quality_before"], samples["quality_after"]
    assert before["frame_accuracy"] == after["frame_accuracy"]
    assert applied.report["engine_difference"]["relative_error"] <= 1e-4
    assert [gate["held"] for gate in applied.report["gates"]] == [True, True]


def test_the_report_shows_the_clips(applied):
    page = (applied.folder / "report.html").read_text("utf-8")
    assert page.count("data:image/") >= 2 * SAMPLES
    assert json.loads((applied.folder / "report.json").read_text("utf-8"))["samples"]["psnr"]


def test_run_needs_nothing_but_the_bundle(optpass, applied, tmp_path):
    outcome = optpass("run", applied.folder, "--samples", 2, "--labels", "3,7", "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["labels"] == [3, 7]
    frames = np.load(tmp_path / "out" / "samples.npz")["frames"]
    assert frames.shape == (2, 8, 1, 32, 32)
    clips = sorted(path.name for path in (tmp_path / "out").glob("*.webp"))
    assert clips == ["clip-000-label-3.webp", "clip-001-label-7.webp"]
    again = optpass("run", applied.folder, "-o", tmp_path / "out")
    assert again.code == 2
    assert "--force" in again.err


def test_compare_with_the_checkpoint(optpass, applied, moving_digits):
    outcome = optpass("compare", moving_digits, applied.folder, "--samples", 2, "--steps", 6, "--runs", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["difference"]["relative_error"] <= 1e-4
    assert outcome.json["samples"]["psnr"] >= 40


def test_drop_in_for_the_pipelines_unet(applied, moving_digits):
    from optpass.runtime.class_to_video import ClassToVideoPipeline

    eager = ClassToVideoPipeline.load(moving_digits)
    expected = eager([5], num_inference_steps=4, seeds=[1]).frames
    eager.unet = library.load(applied.folder)
    found = eager([5], num_inference_steps=4, seeds=[1]).frames
    assert float((torch.as_tensor(found) - torch.as_tensor(expected)).abs().max()) < 1e-3


def test_a_quality_gate_that_fails_keeps_a_reproducer_that_fails_alike(optpass, moving_digits, tmp_path):
    recipe = tmp_path / "strict.yaml"
    gate = "{after: cast, metric: psnr, min: 200, clips: 1, steps: 2}"
    recipe.write_text(f"dtype: float32\npasses: [{{cast: {{dtype: float16}}}}]\ngates: [{gate}]\ntarget: program\n")
    outcome = optpass("apply", recipe, moving_digits, "-o", tmp_path / "b", "--inputs", "sample=2x8x4x16x16", "--json")
    assert outcome.code == 3
    assert not (tmp_path / "b").exists()
    folder = outcome.json["error"]["reproducer"]
    again = optpass("apply", f"{folder}/recipe.yaml", f"{folder}/program", "-o", tmp_path / "again")
    assert again.code == 3
    assert "psnr" in again.err
