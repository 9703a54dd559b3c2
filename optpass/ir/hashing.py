"""Content hashes: of files, tensors and texts, and of files while they are written. SHA-256 everywhere."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Bytes of a piece, where a file is written or copied."""

Bytes = bytes | memoryview


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Hex SHA-256 of dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a CPU tensor in row-major order, without a copy when it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


class HashedFile:
    """A new file that is hashed as it is written: each piece on another thread while the disk takes it.

    Context; :attr:`digest` is the hex SHA-256 of what was written so far, :attr:`size` its bytes. A
    piece is held until both are done with it, and no longer. Left by an error, no file stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        """
        Raises:
            OSError: the file cannot be made.
        """
        # Unbuffered: pieces are whole tensors.
        self._file = self.path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        return self

    def write(self, data: Bytes) -> None:
        """
        Raises:
            OSError: the disk is full, or fails.
        """
        # The thread takes the piece out of the list: it may outlive the call, and must not hold the piece then.
        pieces = [data]
        hashed: Future[None] = self._thread.submit(lambda: self._hash.update(pieces.pop()))
        rest = memoryview(data)
        try:
            while rest:
                # The kernel takes a third of the time for pieces that it takes for a whole tensor.
                rest = rest[self._file.write(rest[:CHUNK]) :]
        finally:
            hashed.result()
        self.size += len(data)

    def pad(self, alignment: int) -> None:
        """Zeros up to the next multiple of ``alignment`` bytes."""
        if missing := -self.size % alignment:
            self.write(bytes(missing))

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._file.close()
        if error is not None:
            self.path.unlink(missing_ok=True)


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file's content; its hex SHA-256, for which nothing is read twice.

    Raises:
        OSError: ``source`` cannot be read or ``target`` not written, which then is not there.
    """
    with source.open("rb", buffering=0) as file, HashedFile(target) as copy:
        while piece := file.read(CHUNK):
            copy.write(piece)
        return copy.digest
