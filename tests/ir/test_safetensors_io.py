"""The safetensors reader and the streaming writer, against the format's own library."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optpass.errors import UserError, WeightError
from optpass.ir.hashing import file_digest, tensor_bytes
from optpass.ir.safetensors_io import FILE_DTYPES, METADATA, Stored, checked, read_safetensors, write_safetensors
from optpass.ir.weights import Constant, Expression, Shape

DTYPES = sorted(FILE_DTYPES.values(), key=str)


def tensors(*dtypes: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 4), max_size=3)

    def make(arguments: tuple[torch.dtype, list[int], int]) -> torch.Tensor:
        dtype, shape, seed = arguments
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    return st.tuples(st.sampled_from(dtypes), shapes, st.integers(0, 99)).map(make)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), tensors(*DTYPES), max_size=6))
def test_what_the_writer_writes_the_library_reads(tmp_path: Path, found: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    digest = write_safetensors({name: Constant(value) for name, value in found.items()}, path)
    back = load_file(path)
    assert back.keys() == found.keys()
    for name, value in found.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert bytes(tensor_bytes(back[name])) == bytes(tensor_bytes(value))
    assert digest == file_digest(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.dictionaries(
        # The library itself writes a header with that name twice, which it cannot read either.
        st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != METADATA),
        tensors(torch.float32, torch.int8),
        max_size=4,
    )
)
def test_what_the_library_writes_the_reader_reads(tmp_path: Path, found: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    save_file(found, path, metadata={"format": "pt"})
    read = read_safetensors(path)
    assert read.keys() == found.keys()
    for name, value in found.items():
        assert (read[name].shape, read[name].dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(read[name].evaluate(), value)


def test_metadata_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_safetensors({"a": Constant(torch.ones(2))}, tmp_path / "x", metadata={"format": "pt"})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@dataclass(frozen=True, eq=False)
class Counted(Expression):
    """A tensor of 4 MB that counts how many of its kind are alive."""

    alive: set[int]
    most: list[int]
    shape: Shape = (1024, 1024)
    dtype: torch.dtype = torch.float32

    def evaluate(self) -> torch.Tensor:
        import weakref

        value = torch.ones(self.shape)
        self.alive.add(id(value))
        weakref.finalize(value, self.alive.discard, id(value))
        self.most.append(len(self.alive))
        return value

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return "counted"


def test_the_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: set[int] = set()
    most: list[int] = []
    write_safetensors({f"w{i}": Counted(alive, most) for i in range(8)}, tmp_path / "x")
    assert len(most) == 8
    # The next tensor is evaluated before the name of the last one is rebound.
    assert max(most) <= 2
    assert not alive


def test_progress_counts_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    weights = {"a": Constant(torch.ones(3)), "b": Constant(torch.ones(2, dtype=torch.int8))}
    write_safetensors(weights, tmp_path / "x", progress=seen.append)
    assert seen == [12, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_inf_are_refused_by_name_and_leave_no_file(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    weights = {"fine": Constant(torch.ones(3)), "up.0.weight": Constant(torch.tensor([1.0, bad, bad]).to(dtype))}
    with pytest.raises(WeightError, match=r"'up\.0\.weight' holds 2 NaN or Inf of 3 values"):
        write_safetensors(weights, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    write_safetensors(weights, tmp_path / "x", allow_nonfinite=True)
    assert (tmp_path / "x").exists()


def test_checked_accepts_integers_and_finite_floats() -> None:
    assert checked("n", Constant(torch.arange(3))).tolist() == [0, 1, 2]


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("optpass.ir.safetensors_io.tensor_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*x: No space left on device"):
        write_safetensors({"a": Constant(torch.ones(2))}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_dtype_outside_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"'a' .*cannot be stored"):
        write_safetensors({"a": Constant(torch.ones(2, dtype=torch.complex128))}, tmp_path / "x")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(4, 4), "b": torch.zeros(3)}, path)
    return path


def with_header(path: Path, header: Any, *, data: bytes = b"\0" * 76, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(begin: Any = 0, end: Any = 12, shape: Any = (3,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"cannot read weights .*gone\.safetensors: No such file"):
        read_safetensors(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 8, 40])
def test_a_file_cut_in_its_header_is_reported(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightError, match="truncated or not a safetensors file"):
        read_safetensors(file)


def test_a_file_cut_in_its_data_is_reported_with_the_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(WeightError, match=r"truncated: the data of '.*' ends"):
        read_safetensors(file)


DAMAGED = {
    "no JSON": (b"{not json!", "damaged safetensors header"),
    "no UTF-8": (b"\xff\xfe{}", "damaged safetensors header"),
    "no object": ([1, 2], "not an object"),
    "no dtype": ({"a": {"shape": [3], "data_offsets": [0, 12]}}, "damaged safetensors header at 'a'"),
    "no table": ({"a": 3}, "damaged safetensors header at 'a'"),
    "unknown dtype": ({"a": entry(dtype="F4")}, "unsupported dtype 'F4'"),
    "offsets do not fit": ({"a": entry(0, 8)}, "offsets of 'a' do not fit its shape"),
    "negative size": ({"a": entry(shape=[-3])}, "damaged safetensors header at 'a'"),
    "size no number": ({"a": entry(shape=["3"])}, "damaged safetensors header at 'a'"),
    "offsets reversed": ({"a": entry(12, 0)}, "do not fit its shape"),
    "hole": ({"a": entry(4, 16)}, "hole or overlap at byte 0"),
    "overlap": ({"a": entry(0, 12), "b": entry(0, 12)}, "hole or overlap"),
    "rest": ({"a": entry(0, 12)}, "64 bytes belong to no tensor"),
    "twice": (b'{"a": {}, "a": {}}', "a name occurs twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_reported(tmp_path: Path, case: str) -> None:
    header, message = DAMAGED[case]
    with pytest.raises(WeightError, match=message):
        read_safetensors(with_header(tmp_path / "x.safetensors", header))


def test_a_header_longer_than_the_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="truncated or not a safetensors file"):
        read_safetensors(with_header(tmp_path / "x.safetensors", {}, length=1 << 62))


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(WeightError, match="Git LFS pointer"):
        read_safetensors(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(position=st.integers(0, 150), value=st.integers(0, 255))
def test_a_changed_byte_never_gives_anything_but_a_weight_error(file: Path, position: int, value: int) -> None:
    save_file({"a.weight": torch.ones(4, 4), "b": torch.zeros(3)}, file)
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(bytes(data))
    with contextlib.suppress(WeightError):
        for expression in read_safetensors(file).values():
            assert expression.evaluate().shape == expression.shape


def test_a_replaced_file_is_not_read_through_the_old_map(file: Path) -> None:
    leaf = Stored(file, "b", (3,), torch.float32)
    assert leaf.evaluate().tolist() == [0, 0, 0]
    file.unlink()
    save_file({"b": torch.arange(3.0), "c": torch.zeros(1)}, file)
    assert leaf.evaluate().tolist() == [0, 1, 2]


def test_a_file_that_disappears_is_reported(file: Path) -> None:
    leaf = read_safetensors(file)["b"]
    file.unlink()
    with pytest.raises(WeightError, match="cannot read 'b'"):
        leaf.evaluate()
