"""The checkpoint's identity for lock files: one hash over its configuration and every weight file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from optpass.ir.hashing import file_digest
from optpass.ir.program import Program
from optpass.ir.weights import Expression


def checkpoint_digest(program: Program) -> str:
    """Hex SHA-256 of the configuration and the content of every file that ``program``'s weights come from.

    ``program`` is as it was captured: passes may bring in weights of other files. Every byte of the
    files is read, once a process; call it when a bundle is written. File names do not count.
    """
    digest = hashlib.sha256(json.dumps(program.origin.as_json()["config"], sort_keys=True, default=str).encode())
    for content in sorted(_cached_digest(path, *_stamp(path)) for path in weight_files(program)):
        digest.update(content.encode())
    return digest.hexdigest()


def weight_files(program: Program) -> list[Path]:
    """The files that the weights in use are read from, each once, in name order."""
    return sorted({path for expression in program.used_weights().values() for path in _paths(expression)})


def _paths(expression: Expression) -> Iterator[Path]:
    path = getattr(expression, "path", None)
    if isinstance(path, Path):
        yield path
    for operand in expression.operands():
        yield from _paths(operand)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _cached_digest(path: Path, size: int, modified: int) -> str:
    return file_digest(path)
