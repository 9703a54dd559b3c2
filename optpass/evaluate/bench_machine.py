"""What a machine was like while something was measured on it: what else it ran, at which clock."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optpass.pipeline.records import machine, tool_versions

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class Moment:
    """The kernel's counters at one moment; ``busy`` are CPU seconds of all processes, ``None`` where nobody counts.

    ``load`` is the load average of a minute, ``megahertz`` the clock of every core.
    """

    clock: float
    busy: float | None
    load: float | None
    megahertz: tuple[float, ...]

    @staticmethod
    def now() -> Moment:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return Moment(time.monotonic(), _busy_seconds(), load, _megahertz())


def machine_state(before: Moment, after: Moment, own_seconds: float) -> dict[str, Any]:
    """The machine, and what else it did from ``before`` to ``after``; ``own_seconds`` of CPU were the benchmark's.

    ``others`` is how many cores all other processes kept busy in the mean, ``None`` where that is not known.
    """
    others = None
    elapsed = after.clock - before.clock
    if before.busy is not None and after.busy is not None and elapsed > 0:
        others = max(0.0, after.busy - before.busy - own_seconds) / elapsed
    return {
        **machine(),
        "governor": _first_line(GOVERNOR),
        "megahertz": {"before": _rounded(before.megahertz), "after": _rounded(after.megahertz)},
        "load": {"before": before.load, "after": after.load},
        "others": others,
        "seconds": elapsed,
        "tools": tool_versions(),
    }


def _busy_seconds() -> float | None:
    line = _first_line(Path("/proc/stat"))
    if line is None or not line.startswith("cpu "):
        return None
    user, nice, system, _idle, _wait, irq, softirq, *_ = (int(field) for field in line.split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _megahertz() -> tuple[float, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ()
    return tuple(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))


def _rounded(values: Sequence[float]) -> list[int]:
    return [round(value) for value in values]


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
