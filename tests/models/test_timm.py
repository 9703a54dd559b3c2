"""The timm models of the zoo, each at a small size from checkpoint to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo
from case import Case
from cases_timm import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small(case: Case, tmp_path: Path) -> None:
    zoo.check(case, zoo.run(case, tmp_path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_full_config_has_the_published_parameters(case: Case) -> None:
    assert zoo.full_parameters(case) == pytest.approx(case.published, rel=5e-3)
