"""The transformers models of the zoo, each at a small size from checkpoint to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from case import Case
from cases_transformers import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small(case: Case, tmp_path: Path) -> None:
    zoo.check(case, zoo.run(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_open_dimensions(case: Case, tmp_path: Path) -> None:
    zoo.check_dynamic(case, zoo.run_dynamic(case, tmp_path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_dimension_is_open_or_says_why_not(case: Case) -> None:
    module = zoo.small_model(case).get_submodule(case.component)
    assert {*case.dynamic, *zoo.limited(case)} == zoo.inputs_of(case, module).named


@pytest.mark.parametrize("case", [case for case in CASES if case.published], ids=lambda case: case.name)
def test_the_full_config_has_the_published_parameters(case: Case) -> None:
    assert zoo.full_parameters(case) == pytest.approx(case.published, rel=5e-3)


def test_transformers_own_dpt_takes_squares_only() -> None:
    (case,) = (case for case in CASES if case.name == "DPT")
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        zoo.small_model(case)(torch.zeros(1, 3, 48, 32))
