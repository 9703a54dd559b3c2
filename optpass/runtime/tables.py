"""Results that depend on nothing but their inputs, kept for the next time these come: rows by timestep."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import Tensor

from optpass.ir.hashing import tensor_digest

LARGEST = 1 << 29
"""Bytes of rows that one module keeps: two prompts of Flux at fifty steps, every timestep of most other models."""

Row = Mapping[str, Tensor]


class Table:
    """Rows by the content of the inputs that they were made from; the one that rested longest goes first.

    Safe to use from several threads; a row that two ask for at a time may be made twice.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self._largest = largest
        self._rows: OrderedDict[tuple[str, ...], Row] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def row(self, entry: str, given: Mapping[str, Tensor], make: Callable[[], Row]) -> Row:
        """What ``entry`` gives for the inputs ``given``: kept, or made now."""
        key = (entry, *map(tensor_digest, given.values()))
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
                return self._rows[key]
        made = make()
        with self._lock:
            self._bytes += _nbytes(made) - _nbytes(self._rows.pop(key, {}))
            self._rows[key] = made
            while self._bytes > self._largest and len(self._rows) > 1:
                self._bytes -= _nbytes(self._rows.popitem(last=False)[1])
        return made


def _nbytes(row: Row) -> int:
    return sum(value.nbytes for value in row.values())
