"""What a bundle knows of the weights that can be exchanged: where they lie, what they are made of, what is in them.

``refit/slots.json`` has a record for every tensor of the engines' slot files, ``refit/base.safetensors`` the
values that do not come from an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from optpass.errors import UserError
from optpass.interchange.expression_json import decode, encode
from optpass.ir.safetensors_io import read_safetensors, write_safetensors
from optpass.ir.slots import Placement, Slot, slots_in
from optpass.ir.weights import Expression
from optpass.pipeline.options import validated
from optpass.pipeline.target import LoweredEntry
from optpass.runtime.bundle import REFIT
from optpass.untrusted import inside, read_json

SLOTS, BASE = f"{REFIT}/slots.json", f"{REFIT}/base.safetensors"
SCHEMA = 1

Fill = Callable[[str, str, Expression], Expression]
"""A slot's name, its role and what stands there without content → its content."""


class TensorSlots(BaseModel):
    """One tensor of a slot file: ``length`` bytes at ``offset``, the row-major values of ``expression``."""

    file: str
    offset: int
    length: int
    expression: dict[str, Any]


class SlotRecords(BaseModel):
    """``slots.json``: the tensors, in the order of their files, and what is in their slots, in words."""

    schema_version: int
    content: list[str]
    tensors: list[TensorSlots]

    def expressions(self, folder: Path, fill: Fill) -> list[Expression]:
        """The tensors' expressions with the slots' content from ``fill``.

        Raises:
            UserError: a record is damaged, or leaves the folder.
        """
        leaves = read_safetensors(folder / BASE) if (folder / BASE).is_file() else {}

        def leaf(key: str) -> Expression:
            if key not in leaves:
                raise UserError(f"{folder / BASE} is damaged: it lacks {key!r}")
            return leaves[key]

        def filled(name: str, role: str, base: Expression) -> Expression:
            return Slot(name, role, base, fill(name, role, base), "")

        found = [decode(tensor.expression, leaf, filled) for tensor in self.tensors]
        for tensor, expression in zip(self.tensors, found, strict=True):
            inside(folder, tensor.file, folder / SLOTS)
            if expression.nbytes != tensor.length:
                raise UserError(f"{folder / SLOTS} is damaged: {expression.nbytes} bytes do not fit {tensor.length}")
        return found

    def slots(self, folder: Path) -> dict[tuple[str, str], Expression]:
        """By name and role: what stands in each slot without content.

        Raises:
            UserError: a record is damaged.
        """
        found: dict[tuple[str, str], Expression] = {}

        def note(name: str, role: str, base: Expression) -> Expression:
            found[name, role] = base
            return base

        self.expressions(folder, note)
        return found


def write_slots(folder: Path, engines: Mapping[str, LoweredEntry], *, allow_nonfinite: bool = False) -> dict[str, str]:
    """Write the records of what ``engines``, which lie in ``folder``, have for exchange; hashes by file name.

    Raises:
        WeightError: a weight under an adapter cannot be read.
        UserError: a file cannot be written.
    """
    placements = list(dict.fromkeys(item for engine in engines.values() for item in engine.slotted))
    if not placements:
        return {}
    (folder / REFIT).mkdir()
    keys: dict[Expression, str] = {}

    def leaf(expression: Expression) -> str:
        return keys.setdefault(expression, str(len(keys)))

    tensors = [_record(item, leaf) for item in placements]
    records = SlotRecords(schema_version=SCHEMA, content=_content(placements), tensors=tensors)
    (folder / SLOTS).write_text(records.model_dump_json(indent=1), encoding="utf-8")
    if not keys:
        return {}
    stored = {key: expression for expression, key in keys.items()}
    return {BASE: write_safetensors(stored, folder / BASE, allow_nonfinite=allow_nonfinite)}


def read_slots(folder: Path) -> SlotRecords:
    """The records in ``folder``.

    Raises:
        UserError: they are damaged, or newer than this optpass.
    """
    data = read_json(folder / SLOTS)
    records = validated(SlotRecords, data, f"{folder / SLOTS} is damaged")
    if records.schema_version > SCHEMA:
        raise UserError(f"{folder / SLOTS} has schema {records.schema_version}: install a newer optpass")
    return records


def _record(item: Placement, leaf: Callable[[Expression], str]) -> TensorSlots:
    return TensorSlots(file=item.file, offset=item.offset, length=item.length, expression=encode(item.expression, leaf))


def _content(placements: Sequence[Placement]) -> list[str]:
    slots: list[Slot] = [slot for item in placements for slot in slots_in(item.expression)]
    return list(dict.fromkeys(slot.content for slot in slots if slot.content))
