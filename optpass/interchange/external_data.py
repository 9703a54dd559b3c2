"""The weights of ONNX files: one data file beside them, streamed, hashed once, shared by several models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from optpass.errors import UserError
from optpass.interchange.onnx_quantized import stored
from optpass.ir.hashing import HashedFile, tensor_bytes
from optpass.ir.safetensors_io import checked
from optpass.ir.slots import Placement, has_slot
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
    """Context: the data files that models beside them share; an expression that several of them use is written once.

    Weights whose content can be exchanged (:mod:`optpass.ir.slots`) go to a file of their own,
    ``NAME.slots.data``, so that an exchange writes no other. Evaluates one tensor at a time. Left by an
    error, or with nothing in it, no file stays.
    """

    def __init__(self, path: Path, *, allow_nonfinite: bool = False) -> None:
        self.allow_nonfinite = allow_nonfinite
        self._fixed = DataFile(path)
        self._exchangeable = DataFile(path.with_name(f"{path.stem}.slots{path.suffix}"))

    def __enter__(self) -> Self:
        """
        Raises:
            UserError: a file cannot be made.
        """
        with ExitStack() as stack:
            stack.enter_context(self._fixed)
            stack.enter_context(self._exchangeable)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def digests(self) -> dict[str, str]:
        """Hex SHA-256 of the files so far, by their names; of those with something in them."""
        return {file.path.name: file.digest for file in (self._fixed, self._exchangeable) if file.size}

    @property
    def slotted(self) -> tuple[Placement, ...]:
        """Where the tensors lie whose content can be exchanged."""
        name = self._exchangeable.path.name
        return tuple(
            Placement(name, stretch.offset, stretch.length, expression)
            for expression, stretch in self._exchangeable.written.items()
        )

    def unload(self, model: ir.Model, progress: Callable[[float], None]) -> int:
        """Write ``model``'s initializers and leave references to them in it; the bytes that it refers to.

        Raises:
            WeightError: a weight holds NaN or Inf (unless allowed), or cannot be read.
            UserError: a file cannot be written.
        """
        import onnx_ir

        total = 0
        values = [value for graph in model.graphs() for value in graph.initializers.values()]
        for index, value in enumerate(values, 1):
            tensor = value.const_value
            if tensor is None or (tensor.nbytes <= THRESHOLD and not holds_slot(tensor)):
                continue
            file = self._exchangeable if holds_slot(tensor) else self._fixed
            stretch = self._write(tensor, file)
            value.const_value = onnx_ir.ExternalTensor(
                file.path.name,
                stretch.offset,
                stretch.length,
                tensor.dtype,
                name=str(value.name),
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                base_dir=file.path.parent,
            )
            total += stretch.length
            progress(index / len(values))
        return total

    def _write(self, tensor: ir.TensorProtocol, file: DataFile) -> Stretch:
        found: tuple[str, Expression] | None = tensor.meta.get(EXPRESSION)
        if found is None:
            return file.append(memoryview(tensor.tobytes()))
        weight, expression = found
        if expression not in file.written:
            file.write(weight, expression, allow_nonfinite=self.allow_nonfinite)
        return file.written[expression]


class DataFile:
    """Context: a file of aligned raw tensors, hashed as it is written; ``written`` says where each lies.

    Left by an error, or with nothing in it, no file stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: dict[Expression, Stretch] = {}
        self._file = HashedFile(path)

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
    def size(self) -> int:
        return self._file.size

    @property
    def digest(self) -> str:
        """Hex SHA-256 so far."""
        return self._file.digest

    def write(self, weight: str, expression: Expression, *, allow_nonfinite: bool = False) -> Stretch:
        """Append the values of ``expression``, which ``weight`` is known by.

        Raises:
            WeightError: it holds NaN or Inf (unless allowed), or cannot be read.
            UserError: the file cannot be written.
        """
        stretch = self.append(tensor_bytes(checked(weight, expression, allow_nonfinite=allow_nonfinite)))
        self.written[expression] = stretch
        return stretch

    def append(self, data: memoryview) -> Stretch:
        """
        Raises:
            UserError: the file cannot be written.
        """
        try:
            self._file.pad(ALIGNMENT)
            stretch = Stretch(self._file.size, len(data))
            self._file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        return stretch


def holds_slot(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor's content can be exchanged after the engine is built."""
    found: tuple[str, Expression] | None = tensor.meta.get(EXPRESSION)
    return found is not None and has_slot(found[1])


def lazy_tensor(name: str, weight: str, expression: Expression, *, allow_nonfinite: bool = False) -> ir.LazyTensor:
    """A tensor called ``name`` with the values of ``expression``, which ``weight`` is known by."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

    shape = onnx_ir.Shape(expression.shape)
    kind, data = stored(expression)
    dtype = kind or from_torch_dtype(expression.dtype)

    def evaluate() -> ir.TensorProtocol:
        value = checked(weight, data, allow_nonfinite=allow_nonfinite)
        if kind is None:
            return TorchTensor(value, name=name)
        packed = onnx_ir.PackedTensor if kind.bitwidth == 4 else onnx_ir.Tensor
        return packed(value.numpy(), kind, shape=shape, name=name)

    tensor = onnx_ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
    tensor.meta[EXPRESSION] = weight, data
    return tensor
