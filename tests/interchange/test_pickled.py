"""Files of torch.save: mapped, mixed in dtype, and damaged in every way that happens to downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optpass.errors import WeightError
from optpass.interchange.pickled import read_pickled

MIXED = {
    "conv.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "norm.weight": torch.ones(3) * 1.1,
    "norm.bias": torch.ones(3, dtype=torch.bfloat16) * 0.3,
    "norm.num_batches_tracked": torch.tensor(7),
    "scale": torch.tensor([0.1], dtype=torch.float64),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pth"


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before torch 1.6"])
def test_tensors_of_mixed_dtypes_are_read_as_they_are(path: Path, archive: bool) -> None:
    torch.save(MIXED, path, _use_new_zipfile_serialization=archive)
    read = read_pickled(path)
    assert read.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert (read[name].shape, read[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(read[name].evaluate(), tensor)


def test_nothing_is_read_until_it_is_evaluated(path: Path) -> None:
    torch.save({"a": torch.ones(4096), "b": torch.zeros(4096)}, path)
    leaf = read_pickled(path)["b"]
    data = path.read_bytes()
    zeros = data.rindex(torch.zeros(4096).numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(zeros)
        file.write(torch.full((4096,), 2.0).numpy().tobytes())
    assert leaf.evaluate().unique().tolist() == [2.0]


def test_views_and_parameters_are_plain_tensors_in_order(path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    torch.save({"turned": nn.Parameter(matrix.t()), "row": matrix[1]}, path)
    read = read_pickled(path)
    turned = read["turned"].evaluate()
    assert turned.is_contiguous()
    assert not turned.requires_grad
    assert turned.tolist() == matrix.t().tolist()
    assert read["row"].evaluate().tolist() == [3, 4, 5]


def cut(path: Path, keep: Callable[[int], int], archive: bool = True) -> None:
    torch.save(MIXED, path, _use_new_zipfile_serialization=archive)
    data = path.read_bytes()
    path.write_bytes(data[: keep(len(data))])


@pytest.mark.parametrize("keep", [lambda n: 10, lambda n: n // 2, lambda n: n - 1], ids=["start", "half", "end"])
def test_a_truncated_archive_is_called_that(path: Path, keep: Callable[[int], int]) -> None:
    cut(path, keep)
    with pytest.raises(WeightError, match=r"x\.pth is truncated: the end of the archive is missing \(\d+ bytes"):
        read_pickled(path)


@pytest.mark.parametrize("keep", range(2, 1000, 37))
def test_a_truncated_older_file_is_an_error_wherever_it_ends(path: Path, keep: int) -> None:
    cut(path, lambda length: min(keep, length - 1), archive=False)
    with pytest.raises(WeightError, match=r"x\.pth is (damaged|refused)"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Not found</title>", "is no PyTorch weight file"),
        (b"\0" * 64, "is no PyTorch weight file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "is a Git LFS pointer"),
    ],
)
def test_what_was_downloaded_instead_is_recognised(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(WeightError, match=rf"x\.pth {message}"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(3).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "without values"),
    ],
)
def test_a_tensor_that_is_not_plain_is_named(path: Path, tensor: Tensor, kind: str) -> None:
    torch.save({"fine": torch.ones(2), "head.weight": tensor}, path)
    with pytest.raises(WeightError, match=rf"x\.pth: 'head\.weight' is {kind}"):
        read_pickled(path)


def test_a_scripted_model_is_no_weight_file(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    with pytest.raises(WeightError, match=r"x\.pth is damaged, or no PyTorch weight file: .*TorchScript"):
        read_pickled(path)
