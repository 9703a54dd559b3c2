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
    """``cpu`` is user and system time; memory in bytes, ``anonymous`` without mapped files; what it ``printed``."""

    wall: float
    cpu: float
    anonymous: int
    resident: int
    printed: bytes


def watch(command: Sequence[str], *, cwd: Path | None = None) -> Watched:
    """Run ``command`` to its end; memory is sampled every 20 ms from ``/proc``, for the kernel keeps no peak of it.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=cwd)
        anonymous = resident = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            found = _sample(process.pid)
            anonymous, resident = max(anonymous, found["RssAnon"]), max(resident, found["VmHWM"])
            time.sleep(INTERVAL)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, errors):
            file.seek(0)
        printed = output.read()
        if process.returncode:
            said = (printed + errors.read()).decode()[-4000:]
            raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{said}")
    # Not ru_maxrss: it counts the parent's own memory at the moment of the fork.
    return Watched(wall, usage.ru_utime + usage.ru_stime, anonymous, resident, printed)


def _sample(pid: int) -> dict[str, int]:
    """``RssAnon`` and ``VmHWM`` in bytes; zeros when the process is gone."""
    found = dict.fromkeys(("RssAnon", "VmHWM"), 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return found
    for line in lines:
        key, _, value = line.partition(":")
        if key in found and value.split():
            found[key] = int(value.split()[0]) * 1024
    return found
