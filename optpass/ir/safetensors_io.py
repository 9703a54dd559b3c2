"""Safetensors files: checked headers, lazy leaves over the memory map, and a streaming writer.

The library ``safetensors`` reads; its writer wants every tensor at once, so writing is ours: the
header needs shapes only, and then one tensor after another is evaluated, checked, hashed and written.
Format: 8 bytes little-endian header size, JSON header, data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optpass.errors import UserError, WeightError
from optpass.ir.hashing import HashedFile, tensor_bytes
from optpass.ir.weights import Expression, Shape, dtype_name

FILE_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES_IN_FILE = {dtype: name for name, dtype in FILE_DTYPES.items()}
HEADER_LIMIT = 100_000_000
METADATA = "__metadata__"
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored(Expression):
    """One tensor of a safetensors file."""

    path: Path
    key: str
    shape: Shape
    dtype: torch.dtype

    def evaluate(self) -> Tensor:
        try:
            status = self.path.stat()
            tensor: Tensor = _opened(self.path, status.st_size, status.st_mtime_ns).get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{self.path}: cannot read {self.key!r}: {error}") from error
        return tensor

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"{self.path.name}[{self.key}]"


@lru_cache(maxsize=32)
def _opened(path: Path, size: int, modified: int) -> Any:
    """The open map; ``size`` and ``modified`` (ns) keep a replaced file from being read through the old map."""
    return safe_open(path, framework="pt")


def read_safetensors(path: Path) -> dict[str, Expression]:
    """Lazy leaves for every tensor of a safetensors file; the header is checked, no value is read.

    Raises:
        WeightError: the file is missing, truncated, or its header is damaged.
    """
    header = read_header(path)
    return {
        key: Stored(path.resolve(), key, tuple(entry["shape"]), FILE_DTYPES[entry["dtype"]])
        for key, entry in header.items()
    }


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The checked header of a safetensors file, without ``__metadata__``.

    Raises:
        WeightError: as :func:`read_safetensors`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if _is_pointer(file.read(len(POINTER) - 8), length):
                raise WeightError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
            file.seek(8)
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise WeightError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_distinct)
    except OSError as error:
        raise WeightError(f"cannot read weights {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{path}: damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise WeightError(f"{path}: damaged safetensors header: not an object")
    header.pop(METADATA, None)
    for key, entry in header.items():
        _check_entry(path, key, entry, size - 8 - length)
    _check_coverage(path, header, size - 8 - length)
    return header


def _is_pointer(rest: bytes, length: int) -> bool:
    return length.to_bytes(8, "little") + rest == POINTER


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_entry(path: Path, key: str, entry: Any, available: int) -> None:
    try:
        begin, end = entry["data_offsets"]
        dtype = FILE_DTYPES.get(entry["dtype"])
        if not all(isinstance(n, int) and n >= 0 for n in (*entry["shape"], begin, end)):
            raise ValueError("sizes and offsets are whole numbers")
        expected = prod(entry["shape"]) * (dtype.itemsize if dtype else 0)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightError(f"{path}: damaged safetensors header at {key!r}") from error
    if dtype is None:
        raise WeightError(f"{path}: tensor {key!r} has the unsupported dtype {entry['dtype']!r}")
    if end - begin != expected:
        raise WeightError(f"{path}: damaged safetensors header: offsets of {key!r} do not fit its shape")
    if end > available:
        raise WeightError(f"{path}: truncated: the data of {key!r} ends {end - available} bytes past the file")


def _check_coverage(path: Path, header: Mapping[str, Mapping[str, Any]], available: int) -> None:
    """The format wants the tensors to fill the data without holes, overlaps or a rest."""
    reached = 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if begin != reached:
            raise WeightError(f"{path}: damaged safetensors header: hole or overlap at byte {min(begin, reached)}")
        reached = end
    if reached != available:
        raise WeightError(f"{path}: damaged: {available - reached} bytes belong to no tensor")


def write_safetensors(
    tensors: Mapping[str, Expression],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Stream ``tensors`` to ``path``, holding one tensor at a time; the file's hex SHA-256.

    Wider dtypes come first in the file, so that every tensor is aligned to its own size. ``progress``
    is called with the number of bytes just written. On failure no file is left.

    Raises:
        WeightError: a tensor holds NaN or Inf (unless ``allow_nonfinite``), cannot be read, or has a
            dtype that the format lacks.
        UserError: the file cannot be written (disk full, no permission).
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    text = _header(ordered, metadata or {})
    try:
        with HashedFile(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, expression in ordered.items():
                data = tensor_bytes(checked(name, expression, allow_nonfinite=allow_nonfinite))
                file.write(data)
                progress(len(data))
                del data  # before the next one is evaluated
            return file.digest
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _header(tensors: Mapping[str, Expression], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, expression in tensors.items():
        if expression.dtype not in NAMES_IN_FILE or name == METADATA:
            raise WeightError(f"weight {name!r} ({dtype_name(expression.dtype)}) cannot be stored in safetensors")
        end = offset + expression.nbytes
        header[name] = {
            "dtype": NAMES_IN_FILE[expression.dtype],
            "shape": list(expression.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def checked(name: str, expression: Expression, *, allow_nonfinite: bool = False) -> Tensor:
    """The value of ``expression``, refused when it holds NaN or Inf.

    Raises:
        WeightError: it does, and ``allow_nonfinite`` is false.
    """
    value = expression.evaluate()
    if tuple(value.shape) != tuple(expression.shape) or value.dtype != expression.dtype:
        raise AssertionError(f"{name}: {expression} promised another shape or dtype than it gave")
    if allow_nonfinite or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return value
    if broken := _nonfinite(value):
        raise WeightError(
            f"weight {name!r} holds {broken} NaN or Inf of {value.numel()} values; "
            "repair the checkpoint, or pass --allow-nonfinite to carry them over"
        )
    return value


def _nonfinite(value: Tensor) -> int:
    """How many values are NaN or infinite."""
    # torch has no isfinite for the 8-bit floats, and no order of the complex numbers.
    real = torch.view_as_real(value) if value.is_complex() else value.half() if value.dtype.itemsize == 1 else value
    if not real.numel():
        return 0
    # The extremes carry NaN and Inf; finding them takes no memory, and a thirtieth of isfinite's time.
    low, high = torch.aminmax(real)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return 0
    return int((~torch.isfinite(value if value.is_complex() else real)).sum())
