"""ONNX files → OpenVINO IR: one ``.xml`` each, whose constants all lie in one data file, equal ones once."""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from optpass.errors import UserError
from optpass.ir.hashing import HashedFile
from optpass.quiet import first_lines

if TYPE_CHECKING:
    import openvino

ALIGNMENT = 64
"""Constants start at multiples of this, the width of the widest CPU registers: the file is mapped."""
STRETCH = re.compile(r'offset="(\d+)" size="(\d+)"')
"""Where the data of a Const lies in the ``.bin`` beside the ``.xml``, bytes."""
BLOCK = 1 << 24
SHOWN = 5
OPERATORS = re.compile(r"\b([A-Z]\w+)-\d+\b")
NODES = re.compile(r"<Node\(\w+\): ([^>]+)>")
"""How its ONNX frontend names operators without a translation, and nodes that it refuses."""


def converted(path: Path) -> openvino.Model:
    """The OpenVINO model of an ONNX file, whose external data stays mapped while the model lives.

    Raises:
        UserError: OpenVINO cannot convert something in it.
    """
    import openvino

    try:
        return openvino.convert_model(path)
    except Exception as error:
        # Its errors share no base class but Exception.
        places = ", ".join(_blamed(path, str(error)))
        said = first_lines(error, 12).partition("Model wasn't fully converted.")
        raise UserError(f"OpenVINO cannot convert {places or path.name}: {said[2].strip() or said[0]}") from error


def _blamed(path: Path, message: str) -> list[str]:
    """The nodes of an ONNX file that ``message`` is about, as ``module.path (Operator)``; some of them if many."""
    import onnx_ir

    operators, values = set(OPERATORS.findall(message)), set(NODES.findall(message))
    found: dict[str, None] = {}
    for node in onnx_ir.load(path).graph:
        outputs = {value.name for value in node.outputs}
        if (node.op_type in operators and not values) or values & {node.name, *outputs}:
            found[f"{(node.name or '').rpartition('/')[0] or '(root)'} ({node.op_type})"] = None
    return list(found)[:SHOWN]


class SharedIr:
    """Context: IR files that share the data file ``path``; a constant that several of them hold is written once.

    Left by an error, the data file does not stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = HashedFile(path)
        self._written: dict[bytes, int] = {}

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

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the data file so far."""
        return self._file.digest

    def add(self, model: openvino.Model, path: Path, *, half: bool = False) -> int:
        """Write ``model`` to ``path``, with constants of 32 bits in 16 if ``half``; bytes of its files.

        Raises:
            UserError: a file cannot be written.
        """
        import openvino

        own = path.with_suffix(".bin")
        try:
            openvino.save_model(model, path, compress_to_fp16=half)
            text, size = path.read_text("utf-8"), own.stat().st_size
            if size:
                with own.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    text = STRETCH.sub(lambda found: self._moved(data, int(found[1]), int(found[2])), text)
            path.write_text(text, "utf-8")
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {path}: {first_lines(error, 3)}") from error
        finally:
            own.unlink(missing_ok=True)
        return size + path.stat().st_size

    def _moved(self, data: mmap.mmap, offset: int, size: int) -> str:
        """A constant's place in the shared file, where it is written if it is new."""
        key = _digest(data, offset, size)
        if key not in self._written:
            self._file.pad(ALIGNMENT)
            self._written[key] = self._file.size
            for begin in range(offset, offset + size, BLOCK):
                self._file.write(memoryview(data[begin : min(begin + BLOCK, offset + size)]))
        return f'offset="{self._written[key]}" size="{size}"'


def _digest(data: mmap.mmap, offset: int, size: int) -> bytes:
    found = hashlib.sha256(size.to_bytes(8, "little"))
    for begin in range(offset, offset + size, BLOCK):
        found.update(data[begin : min(begin + BLOCK, offset + size)])
    return found.digest()
