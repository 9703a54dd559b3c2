"""Weights in PyTorch's pickled files: memory-mapped, and unpickled weights-only, so that nothing in them runs."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from optpass.errors import WeightError
from optpass.ir.safetensors_io import POINTER
from optpass.ir.weights import Expression, Shape

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts put the state dict."""

ARCHIVE, PICKLE = b"PK", b"\x80"
"""How files of ``torch.save`` begin: zip archives, and before torch 1.6 pickles of protocol 2."""

DAMAGED = (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error)
"""What unpickling a damaged file raises."""


@dataclass(frozen=True, eq=False)
class Mapped(Expression):
    """One tensor of a pickled file, a view of the memory map: its pages are read on evaluation."""

    path: Path
    key: str
    view: Tensor

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return tuple(self.view.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.view.dtype

    def evaluate(self) -> Tensor:
        return self.view.contiguous()

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"{self.path.name}[{self.key}]"


def read_pickled(path: Path) -> dict[str, Expression]:
    """Lazy leaves for every tensor of a ``.pth``/``.pt``/``.bin`` file.

    Raises:
        WeightError: the file is missing or damaged, would run code, or holds no state dict or a tensor
            that is not plain (sparse, quantized, without values).
    """
    state = _state_dict(path, load_weights_only(path, path))
    resolved = path.resolve()
    for name, tensor in state.items():
        _refuse_other_than_plain(path, name, tensor)
    return {name: Mapped(resolved, name, tensor.detach()) for name, tensor in state.items()}


def load_weights_only(source: Path | io.BytesIO, path: Path) -> Any:
    """``torch.load`` that refuses every class but tensors and plain containers.

    ``path`` is what messages call ``source``.

    Raises:
        WeightError: the file is missing or damaged, or asks for anything else.
    """
    try:
        # Files of torch before 1.6 are not zip archives and cannot be mapped.
        mapped = isinstance(source, Path) and _is_archive(source)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise WeightError(f"cannot read weights {path}: {error.strerror or error}") from error
    except UnpicklingError as error:
        raise WeightError(
            f"{path} is refused: its pickle holds more than tensors and could run code ({_reason(error)}); "
            "convert it to safetensors where you trust it"
        ) from error
    except DAMAGED as error:
        raise WeightError(f"{path} is damaged, or no PyTorch weight file: {_reason(error)}") from error


def _is_archive(path: Path) -> bool:
    """Whether ``path`` is a zip archive; what is neither that nor a pickle is not handed to the unpickler."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise WeightError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if not start.startswith((ARCHIVE, PICKLE)):
        raise WeightError(f"{path} is {'no PyTorch weight file' if start else 'empty'}: nothing of torch.save is in it")
    found = zipfile.is_zipfile(path)
    if start.startswith(ARCHIVE) and not found:
        raise WeightError(
            f"{path} is truncated: the end of the archive is missing ({path.stat().st_size} bytes are there)"
        )
    return found


def _refuse_other_than_plain(path: Path, name: str, tensor: Tensor) -> None:
    kinds = {
        "sparse": tensor.layout != torch.strided,
        "quantized": tensor.is_quantized,
        "without values": tensor.is_meta,
    }
    for kind, found in kinds.items():
        if found:
            raise WeightError(f"{path}: {name!r} is {kind}; only plain tensors can be weights")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    blamed = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    return blamed[:200] or type(error).__name__


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise WeightError(f"{path} holds no state dict (a mapping of names to tensors)")
    # torch.nn.DataParallel saves every name under "module."
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
