"""Writing other content into the slots of a finished bundle, and nothing else.

The new slot file is made beside the old one and renamed over it: an engine that is loaded keeps the file
that it has mapped, and a run that is cut short leaves the bundle as it was, or its manifest refuses it
until the exchange is run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from optpass.errors import UserError
from optpass.interchange.external_data import DataFile
from optpass.ir.hashing import file_digest
from optpass.ir.slots import slots_in
from optpass.ir.weights import Expression
from optpass.runtime.bundle import MANIFEST, FileRecord, Manifest, PartRecord, file_inside
from optpass.runtime.slot_records import BASE, SLOTS, Fill, SlotRecords, TensorSlots, read_slots

PARTIAL = ".partial"


@dataclass(frozen=True)
class Exchanged:
    """What was written: tensors and bytes of the slot files, and what is in the slots now."""

    tensors: int
    bytes: int
    content: tuple[str, ...]


def slot_records(bundle: Path, manifest: Manifest, part: PartRecord) -> SlotRecords:
    """The slots of a part, their files as they were written.

    Raises:
        UserError: the part has none, or their records are damaged.
    """
    if part.refit is None:
        raise UserError(
            f"the engines of {bundle} have no exchangeable weights; build them with a pass that keeps some, "
            "as merge-lora: {mode: refit} or {mode: keep} does"
        )
    for name in (SLOTS, BASE):
        path = bundle / part.folder / name
        record = manifest.files.get(path.relative_to(bundle).as_posix())
        if name == SLOTS and record is None:
            raise UserError(f"{bundle / MANIFEST} is damaged: it has no hash of {name}")
        # A run that was cut short may have left a newer list of contents; its records are the same.
        if name == BASE and record is not None and (not path.is_file() or file_digest(path) != record.sha256):
            raise UserError(f"{bundle} is damaged: {name} is not the file that was written (its hash differs)")
    return read_slots(bundle / part.folder)


def exchange(
    bundle: Path,
    manifest: Manifest,
    fills: Sequence[tuple[PartRecord, Fill]],
    content: Sequence[str],
    progress: Callable[[float], None] = lambda fraction: None,
) -> Exchanged:
    """Write what its ``Fill`` gives into every slot of each part; ``content`` names it. Other files stay as they are.

    All parts change, or none.

    Raises:
        WeightError: a value is NaN or infinite, or cannot be read; nothing was changed.
        UserError: the records are damaged, or a file cannot be written.
    """
    work = [(part, fill, slot_records(bundle, manifest, part)) for part, fill in fills]
    counted = _Counted(sum(tensor.length for _, _, records in work for tensor in records.tensors), progress)
    with _Replacement(bundle) as replacement:
        for part, fill, records in work:
            expressions = records.expressions(bundle / part.folder, fill)
            _write_part(replacement, PurePosixPath(part.folder), records, expressions, counted)
            named = records.model_copy(update={"content": list(content)})
            replacement.write((PurePosixPath(part.folder) / SLOTS).as_posix(), named.model_dump_json(indent=1))
        files = {**manifest.files, **replacement.records()}
        replacement.write(MANIFEST, manifest.model_copy(update={"files": files}).model_dump_json(indent=1))
        replacement.commit()
    return Exchanged(sum(len(records.tensors) for _, _, records in work), counted.total, tuple(content))


def _write_part(
    replacement: _Replacement,
    place: PurePosixPath,
    records: SlotRecords,
    expressions: Sequence[Expression],
    counted: _Counted,
) -> None:
    """The new slot files of the part in ``place``."""
    tensors = list(zip(records.tensors, expressions, strict=True))
    for name in dict.fromkeys(tensor.file for tensor in records.tensors):
        with DataFile(replacement.path((place / name).as_posix())) as file:
            for tensor, expression in tensors:
                if tensor.file == name:
                    _write(file, tensor, expression)
                    counted(tensor.length)


def _write(file: DataFile, tensor: TensorSlots, expression: Expression) -> None:
    weight = next((slot.name for slot in slots_in(expression)), tensor.file)
    stretch = file.write(weight, expression)
    if (stretch.offset, stretch.length) != (tensor.offset, tensor.length):
        raise UserError(f"the slots of {tensor.file} are damaged: their places do not follow one another")


class _Replacement:
    """Context: files of a bundle written beside their old selves, and put in their places together, in order."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write what will be ``name``.

        Raises:
            UserError: the name leaves the bundle.
        """
        self.names.append(name)
        return self._partial(name)

    def write(self, name: str, text: str) -> None:
        self.path(name).write_text(text, encoding="utf-8")

    def records(self) -> dict[str, FileRecord]:
        """Sizes and hashes of the new files so far."""
        paths = {name: self._partial(name) for name in self.names}
        return {name: FileRecord(sha256=file_digest(path), bytes=path.stat().st_size) for name, path in paths.items()}

    def commit(self) -> None:
        for name in self.names:
            os.replace(self._partial(name), self.bundle / name)

    def _partial(self, name: str) -> Path:
        path = file_inside(self.bundle, name)
        return path.with_name(path.name + PARTIAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """
        Raises:
            UserError: in place of an error of the disk.
        """
        for name in self.names:
            self._partial(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {self.bundle}: {error.strerror or error}") from error


class _Counted:
    """Bytes written so far, told as a fraction of ``total``."""

    def __init__(self, total: int, progress: Callable[[float], None]) -> None:
        self.total, self.written, self.progress = total, 0, progress

    def __call__(self, count: int) -> None:
        self.written += count
        self.progress(self.written / max(self.total, 1))
