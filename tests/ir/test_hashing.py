"""Files hashed while they are written, against hashlib on what is on the disk."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optpass.ir.hashing import CHUNK, HashedFile, copy_hashed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=6), st.sampled_from([1, 7, 64]))
def test_the_digest_is_that_of_the_file(tmp_path: Path, pieces: list[bytes], alignment: int) -> None:
    path, content = tmp_path / "x", b""
    with HashedFile(path) as file:
        for piece in pieces:
            file.pad(alignment)
            content += bytes(-len(content) % alignment)
            file.write(memoryview(piece))
            content += piece
    assert path.read_bytes() == content
    assert (file.size, file.digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    def fails() -> None:
        with HashedFile(tmp_path / "x") as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_read_once_and_hashed(tmp_path: Path) -> None:
    content = bytes(range(251)) * (CHUNK // 100)
    (tmp_path / "a").write_bytes(content)
    assert copy_hashed(tmp_path / "a", tmp_path / "b") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "b").read_bytes() == content
