"""Safetensors files: checked headers, lazy leaves over the memory map, and a streaming writer.

The library ``safetensors`` reads; its writer wants every tensor at once, so writing is ours: the
header needs shapes only, and then one tensor after another is evaluated, checked, hashed and written.
Format: 8 bytes little-endian header size, JSON header, data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
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

from optpass.errors import WeightError
from optpass.ir.hashing import tensor_bytes
from optpass.ir.weights import Expression, Shape

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


@dataclass(frozen=True)
class Stored(Expression):
    """One tensor of a safetensors file."""

    path: Path
    key: str
    shape: Shape
    dtype: torch.dtype

    def evaluate(self) -> Tensor:
        try:
            tensor: Tensor = _opened(self.path).get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{self.path}: cannot read {self.key!r}: {error}") from error
        return tensor

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"{self.path.name}[{self.key}]"


@lru_cache(maxsize=32)
def _opened(path: Path) -> Any:
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
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise WeightError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise WeightError(f"cannot read weights {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightError(f"{path}: damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise WeightError(f"{path}: damaged safetensors header: not an object")
    header.pop("__metadata__", None)
    for key, entry in header.items():
        _check_entry(path, key, entry, size - 8 - length)
    return header


def _check_entry(path: Path, key: str, entry: Any, available: int) -> None:
    try:
        begin, end = entry["data_offsets"]
        dtype = FILE_DTYPES.get(entry["dtype"])
        expected = prod(int(n) for n in entry["shape"]) * (dtype.itemsize if dtype else 0)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightError(f"{path}: damaged safetensors header at {key!r}") from error
    if dtype is None:
        raise WeightError(f"{path}: tensor {key!r} has the unsupported dtype {entry['dtype']!r}")
    if not 0 <= begin <= end or end - begin != expected:
        raise WeightError(f"{path}: damaged safetensors header: offsets of {key!r} do not fit its shape")
    if end > available:
        raise WeightError(f"{path}: truncated: the data of {key!r} ends {end - available} bytes past the file")


def write_safetensors(
    tensors: Mapping[str, Expression],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Stream ``tensors`` to ``path``, holding one tensor at a time; the file's hex SHA-256.

    ``progress`` is called with the number of bytes just written.

    Raises:
        WeightError: a tensor holds NaN or Inf (unless ``allow_nonfinite``) or cannot be read.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, expression in tensors.items():
        header[name] = {
            "dtype": NAMES_IN_FILE[expression.dtype],
            "shape": list(expression.shape),
            "data_offsets": [offset, offset + expression.nbytes],
        }
        offset += expression.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for name, expression in tensors.items():
            value = checked(name, expression, allow_nonfinite=allow_nonfinite)
            data = tensor_bytes(value)
            file.write(data)
            digest.update(data)
            progress(len(data))
    return digest.hexdigest()


def checked(name: str, expression: Expression, *, allow_nonfinite: bool = False) -> Tensor:
    """The value of ``expression``, refused when it holds NaN or Inf.

    Raises:
        WeightError: it does, and ``allow_nonfinite`` is false.
    """
    value = expression.evaluate()
    if tuple(value.shape) != tuple(expression.shape) or value.dtype != expression.dtype:
        raise AssertionError(f"{name}: {expression} promised another shape or dtype than it gave")
    if allow_nonfinite or not value.dtype.is_floating_point or value.dtype.itemsize == 1:
        return value
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        broken = int((~finite).sum())
        raise WeightError(
            f"weight {name!r} holds {broken} NaN or Inf of {value.numel()} values; "
            "repair the checkpoint, or pass --allow-nonfinite to carry them over"
        )
    return value
