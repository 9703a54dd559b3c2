"""The weights of ONNX files: one data file beside them, streamed, hashed once, shared by several models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from optpass.errors import UserError
from optpass.ir.hashing import HashedFile, tensor_bytes
from optpass.ir.safetensors_io import checked
from optpass.ir.weights import Expression

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGNMENT = 64
"""Tensors start at multiples of this, the width of the widest CPU registers: sessions map the file."""

THRESHOLD = 256
"""Smaller tensors stay in the model: what shape inference and folding look at."""


@dataclass(frozen=True)
class Stretch:
    """Where a tensor lies in the file."""

    offset: int
    length: int


EXPRESSION = "optpass.expression"
"""Key of a tensor's ``meta`` that holds a weight's name (for messages) and the expression of its values."""


class ExternalData:
    """Context: a data file that models beside it share; an expression that several of them use is written once.

    Evaluates one tensor at a time. Left by an error, or with nothing in it, no file stays.
    """

    def __init__(self, path: Path, *, allow_nonfinite: bool = False) -> None:
        self.path = path
        self.allow_nonfinite = allow_nonfinite
        self._file = HashedFile(path)
        self._written: dict[Expression, Stretch] = {}

    def __enter__(self) -> Self:
        """
        Raises:
            UserError: the file cannot be made.
        """
        try:
            self._file.__enter__()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)
        if not self._file.size:
            self.path.unlink(missing_ok=True)

    @property
    def digests(self) -> dict[str, str]:
        """Hex SHA-256 of the file so far, by its name; empty while nothing is in it."""
        return {self.path.name: self._file.digest} if self._file.size else {}

    def unload(self, model: ir.Model, progress: Callable[[float], None]) -> int:
        """Write ``model``'s initializers and leave references to them in it; the bytes that it refers to.

        Raises:
            WeightError: a weight holds NaN or Inf (unless allowed), or cannot be read.
            UserError: the file cannot be written.
        """
        import onnx_ir

        total = 0
        values = [value for graph in model.graphs() for value in graph.initializers.values()]
        for index, value in enumerate(values, 1):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= THRESHOLD:
                continue
            stretch = self._write(tensor)
            value.const_value = onnx_ir.ExternalTensor(
                self.path.name,
                stretch.offset,
                stretch.length,
                tensor.dtype,
                name=str(value.name),
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                base_dir=self.path.parent,
            )
            total += stretch.length
            progress(index / len(values))
        return total

    def _write(self, tensor: ir.TensorProtocol) -> Stretch:
        found: tuple[str, Expression] | None = tensor.meta.get(EXPRESSION)
        if found is None:
            return self._append(memoryview(tensor.tobytes()))
        weight, expression = found
        if expression not in self._written:
            data = tensor_bytes(checked(weight, expression, allow_nonfinite=self.allow_nonfinite))
            self._written[expression] = self._append(data)
        return self._written[expression]

    def _append(self, data: memoryview) -> Stretch:
        try:
            self._file.pad(ALIGNMENT)
            stretch = Stretch(self._file.size, len(data))
            self._file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        return stretch


def lazy_tensor(name: str, weight: str, expression: Expression, *, allow_nonfinite: bool = False) -> ir.LazyTensor:
    """A tensor called ``name`` with the values of ``expression``, which ``weight`` is known by."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

    def evaluate() -> ir.TensorProtocol:
        return TorchTensor(checked(weight, expression, allow_nonfinite=allow_nonfinite), name=name)

    tensor = onnx_ir.LazyTensor(
        evaluate, dtype=from_torch_dtype(expression.dtype), shape=onnx_ir.Shape(expression.shape), name=name
    )
    tensor.meta[EXPRESSION] = weight, expression
    return tensor
