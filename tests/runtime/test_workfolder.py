"""A killed process's folder is removed by the next one for the same name; a live one's never."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optpass.runtime.bundle import BundleWriter
from optpass.runtime.workfolder import WorkFolder

pytest.importorskip("fcntl")

WRITER = """
import sys, time
from optpass.runtime.workfolder import WorkFolder
from pathlib import Path
work = WorkFolder(Path(sys.argv[1]))
work.make()
(work.path / "full.onnx.data").write_bytes(b"half")
print(work.path, flush=True)
time.sleep(60)
"""


def other_process(out: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_process_leaves_nothing_for_long_and_a_live_one_keeps_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"
    live, kept = other_process(out)
    dead, left = other_process(out)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert left.is_dir()
        writer = BundleWriter(out)
        writer.__enter__()
        assert {path.name for path in tmp_path.iterdir()} == {kept.name, writer.folder.name}
        writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert (kept / "full.onnx.data").read_bytes() == b"half"
        assert {path.name for path in tmp_path.iterdir()} == {kept.name}
    finally:
        live.kill()
        live.wait()


def test_other_names_are_nobody_s_business(tmp_path: Path) -> None:
    for name in (".other.partial-1", ".out.partial", "out.partial-1", ".out.replaced-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.partial-link").symlink_to(tmp_path / "precious")
    before = set(tmp_path.iterdir())
    work = WorkFolder(tmp_path / "out")
    work.make()
    work.remove()
    assert set(tmp_path.iterdir()) == before
