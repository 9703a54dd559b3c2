"""Cutting whole architectures: removing channels is making them zero, group by group and all at once."""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path

import cases_diffusers
import cases_timm
import cases_transformers
import pytest
import torch
from axis_oracle import check_sizes, choices, cut_errors, cut_program
from zoo import saved, small_model

from optpass.analysis.axes import axes_of
from optpass.analysis.axes.costs import forecast
from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.passes.reparameterize import Reparameterize
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

CONFIGS = Path(__file__).parents[1] / "configs"
CASES = {case.name: case for case in (*cases_diffusers.CASES, *cases_transformers.CASES, *cases_timm.CASES)}
GROUPS = {
    "SD 1.5 UNet": 50,
    "SDXL UNet": 79,
    "SVD UNet": 95,
    "DiT-XL/2": 13,
    "Flux.1": 12,
    "Wan 2.1 text-to-video 1.3B": 19,
    "VAE-KL decoder": 11,
    "VAE-Wan": 35,
    "timm ResNet-50": 13,
    "timm EfficientNet-B0": 13,
    "timm RepVGG-A0": 5,
    "MobileViT": 61,
    "ConvNeXt V2": 8,
    "ViT": 9,
    "Swin": 16,
    "DETR": 21,
}
"""How many groups the small model has."""
LARGE = ("SDXL UNet", "SVD UNet", "VAE-Wan")
ALONE = 2
"""How many groups are cut alone besides."""


def captured(name, folder):
    if name.startswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is an optional extra")
    case = CASES[name]
    torch.manual_seed(0)
    source, options = saved(case, small_model(case), folder / "model")
    return capture(source, inputs=case.inputs, **options)


def check(program, alone):
    """All groups at once and ``alone`` many by themselves; what was forecast of all is measured."""
    found = axes_of(program)
    check_sizes(program, found)
    half = choices(found)
    each = [{index: kept} for index, kept in half.items()]
    few = random.Random(0).sample(each, min(alone, len(each)))
    assert max(cut_errors(program, [half, *few])) <= 1e-9
    counts = {found.groups[i].atom: len(kept) for i, kept in half.items()}
    costs, after = forecast(program, found), measure(cut_program(program, half)).totals
    assert costs.macs(counts) == pytest.approx(after.macs, rel=1e-9)
    assert costs.parameters(counts) == pytest.approx(after.parameters, rel=1e-9)
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in GROUPS])
def test_all_groups_at_once_and_a_few_alone(tmp_path, name):
    found = check(captured(name, tmp_path), ALONE)
    assert len(found.groups) == GROUPS[name]
    assert not [item.reason for item in found.walk.algebra.fixed if "no axis rule" in item.reason]


def test_repvgg_reparameterised(tmp_path):
    program, record = run_pass(captured("timm RepVGG-A0", tmp_path), Step("reparameterize", Reparameterize()))
    assert record.modified
    found = check(program, ALONE)
    # Without the identity branches only the classifier's input and the outputs of every convolution are left.
    assert {group.kind for group in found.groups} == {"conv"}
    assert len(found.groups) == 22


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.limits.get("capture")])
def test_every_group_alone(tmp_path, name):
    check(captured(name, tmp_path), 10_000)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "groups"), [("sd15-unet", 173), ("svd-unet", 340)])
def test_full_size_is_analysed_in_a_third_of_a_second(config, groups):
    program = capture(CONFIGS / config, structure_only=True)
    start = time.process_time()
    found = axes_of(program)
    assert len(found.groups) == groups
    assert time.process_time() - start <= 0.3
    check_sizes(program, found)
    after = cut_program(program, choices(found))
    assert measure(after).totals.parameters < 0.5 * measure(program).totals.parameters
