"""Files that a recipe names lie beside it, or where they are said to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from optpass.pipeline.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipes" / "adapters").mkdir(parents=True)
    save_file({"x.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "recipes" / "adapters" / "rain.safetensors")
    path = tmp_path / "recipes" / "r.yaml"
    passes = [{"merge-lora": {"adapter": [{"path": "adapters/rain.safetensors", "scale": 0.5}]}}]
    path.write_text(yaml.safe_dump({"passes": passes, "target": "program"}))
    return path


def adapter_of(path: Path, **options: Any) -> Any:
    return load_recipe(path, **options).steps[0].record.adapter


def test_a_file_beside_the_recipe_is_found_from_anywhere(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    [item] = adapter_of(recipe)
    assert item.path == recipe.parent / "adapters" / "rain.safetensors"


def test_what_is_not_there_stays_as_given(recipe: Path) -> None:
    assert adapter_of(recipe, overrides={"merge-lora": {"adapter": "snow.safetensors"}}) == Path("snow.safetensors")
