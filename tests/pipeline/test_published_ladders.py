"""The shipped ladders, structure only, beside the papers' tables: each row within 2 %."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import find_recipe, load_recipe
from optpass.pipeline.request import Request

CONFIGS = Path(__file__).parents[1] / "configs"
TOLERANCE = 0.02


def rungs(recipe, checkpoint, out, **overrides):
    loaded = load_recipe(find_recipe(recipe), overrides=overrides)
    return apply(loaded, Request(str(checkpoint), out, structure_only=True)).report["ladder"]


@pytest.mark.slow
def test_mobilevd(tmp_path):
    """arXiv 2412.07583, Table 1: TFLOP of an evaluation, attention's products included; 523 times less in all."""
    found = rungs("mobilevd-svd", CONFIGS / "svd-unet", tmp_path / "out")
    assert [rung["evaluations"] for rung in found] == [50, 50, 50, 50, 1, 1, 1, 1]
    each = [2 * rung["macs"] / 1e12 for rung in found]
    assert each == pytest.approx([45.43, 45.43, 8.60, 8.24, 8.24, 5.42, 4.64, 4.34], rel=TOLERANCE)
    assert found[0]["total"] / found[-1]["total"] == pytest.approx(523, rel=TOLERANCE)


@pytest.mark.slow
def test_movie(tmp_path):
    """arXiv 2412.06578, Table 1: TFLOP of a frame with the autoencoder, without attention's products."""
    swap = {"checkpoint": str(CONFIGS / "taesd")}
    found = rungs("movie-instructpix2pix", CONFIGS / "instruct-pix2pix", tmp_path / "out", **{"swap-autoencoder": swap})
    totals = {f"{index} {rung['name']}": flop(rung) for index, rung in enumerate(found)}
    published = {"0 captured": 21.31, "3 drop-attention-level": 16.10, "4 steps": 5.50, "5 steps": 0.76}
    assert {name: totals[name] for name in published} == pytest.approx(published, rel=TOLERANCE)
    assert found[0]["parameters"] / 1e6 == pytest.approx(859.53, rel=1e-4)
    assert found[-1]["parameters"] / 1e6 == pytest.approx(846.80, rel=1e-4)


@pytest.mark.slow
def test_efficient_sd15(tmp_path):
    """arXiv 2312.08128, Table 1: TFLOP of an image, without attention's products."""
    found = rungs("efficient-sd15", CONFIGS / "sd15-unet", tmp_path / "out")
    published = [10.8, 10.8, 9.5, 4.7, 2.9]
    assert [flop(rung) for rung in found] == pytest.approx(published, rel=TOLERANCE)


def flop(rung):
    return 2 * (rung["total"] - rung["total_attention"]) / 1e12


@pytest.mark.slow
def test_on_moving_digits_every_rung_is_a_step_down(moving_digits, tmp_path):
    found = rungs("movie-digits", moving_digits, tmp_path / "out")
    assert [rung["evaluations"] for rung in found][-2:] == [40, 8]
    totals = [rung["total"] for rung in found]
    assert totals[0] == totals[1]
    assert all(later < earlier for earlier, later in pairwise(totals[1:]))
