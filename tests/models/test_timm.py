"""The timm models of the zoo, each at a small size from checkpoint to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo
from case import Case
from cases_timm import CASES

from optpass.capture.export import build_fake


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small(case: Case, tmp_path: Path) -> None:
    zoo.check(case, zoo.run(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_open_dimensions(case: Case, tmp_path: Path) -> None:
    zoo.check_dynamic(case, zoo.run_dynamic(case, tmp_path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_dimension_is_open_or_says_why_not(case: Case) -> None:
    assert {*case.dynamic, *zoo.limited(case)} == zoo.inputs_of(case, zoo.small_model(case)).named


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_full_config_has_the_published_parameters(case: Case) -> None:
    module, _ = build_fake(lambda: zoo.timm_model(case.full or {}))
    # Running statistics are no parameters to those who publish the counts, in millions to one place or two.
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(case.published, rel=2e-3)
