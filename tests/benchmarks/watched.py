"""Runs a command and watches it: wall and CPU seconds, peak anonymous and resident memory."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02


@dataclass(frozen=True)
class Watched:
    """``cpu`` is user and system time; memory in bytes, ``anonymous`` without mapped files; bytes read and written.

    ``read`` and ``written`` count system calls; what is read through a memory map is not among it.
    """

    wall: float
    cpu: float
    anonymous: int
    resident: int
    read: int
    written: int


def watch(command: Sequence[str], *, cwd: Path | None = None) -> Watched:
    """Run ``command`` to its end; memory is sampled every 20 ms from ``/proc``, for the kernel keeps no peak of it.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
        anonymous = resident = read = written = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            found = _sample(process.pid)
            anonymous, resident = max(anonymous, found["RssAnon"]), max(resident, found["VmRSS"])
            read, written = max(read, found["rchar"]), max(written, found["wchar"])
            time.sleep(INTERVAL)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{output.read().decode()[-4000:]}")
    peak = max(resident, usage.ru_maxrss * 1024)
    return Watched(wall, usage.ru_utime + usage.ru_stime, anonymous, peak, read, written)


def _sample(pid: int) -> dict[str, int]:
    """``RssAnon`` and ``VmRSS`` in bytes, ``rchar`` and ``wchar``; zeros when the process is gone."""
    found = dict.fromkeys(("RssAnon", "VmRSS", "rchar", "wchar"), 0)
    for file, unit in (("status", 1024), ("io", 1)):
        try:
            lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        except (OSError, ProcessLookupError):
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key in found and value.split():
                found[key] = int(value.split()[0]) * unit
    return found
