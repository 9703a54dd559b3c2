"""The dtype of a capture: the checkpoint's own, unless it mixes, somebody says otherwise, or a target cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optpass.capture.precision import precision
from optpass.capture.sources import capture
from optpass.errors import UserError, WeightError

WEIGHTS = "diffusion_pytorch_model.safetensors"
ONNX = frozenset({torch.float32, torch.float16})


@pytest.fixture
def folder(unet_folder: Path, tmp_path: Path) -> Any:
    """Writes the small UNet's checkpoint with its weights converted."""

    def write(convert: Any) -> Path:
        (tmp_path / "config.json").write_bytes((unet_folder / "config.json").read_bytes())
        tensors = load_file(unet_folder / WEIGHTS)
        save_file({name: convert(name, value).contiguous() for name, value in tensors.items()}, tmp_path / WEIGHTS)
        return tmp_path

    return write


def dtypes(program: Any) -> set[torch.dtype]:
    floats = {e.dtype for e in program.weights.values() if e.dtype.is_floating_point}
    return floats | {spec.dtype for spec in program.entries["full"].outputs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_checkpoint_s_own_dtype_is_kept(dtype: torch.dtype, folder: Any) -> None:
    path = folder(lambda name, value: value.to(dtype))
    assert dtypes(capture(path)) == {dtype}
    assert dtypes(capture(path, structure_only=True)) == {dtype}
    assert dtypes(capture(path, dtype=torch.float32)) == {torch.float32}


def test_a_mixture_is_float32_which_loses_nothing(folder: Any) -> None:
    path = folder(lambda name, value: value.half() if "conv" in name else value.bfloat16())
    assert dtypes(capture(path)) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_dtype_that_the_target_lacks_is_float32(dtype: torch.dtype, folder: Any) -> None:
    assert dtypes(capture(folder(lambda name, value: value.to(dtype)), floats=ONNX)) == {torch.float32}


def test_structure_only_asks_no_more_of_damaged_weights(folder: Any) -> None:
    path = folder(lambda name, value: value.half())
    (path / WEIGHTS).write_bytes(b"damaged")
    assert dtypes(capture(path, structure_only=True)) == {torch.float32}
    with pytest.raises(WeightError, match="truncated"):
        capture(path)


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    assert precision("auto") is None
    with pytest.raises(UserError, match=r"dtype 'flaot16' is none of auto, float32, .*did you mean 'float16'"):
        precision("flaot16")
