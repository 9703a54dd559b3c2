"""The process of one contestant of a benchmark: it loads one engine, and calls it when it is asked to.

``python -m optpass.evaluate.bench_worker`` reads requests from stdin and answers on stdout, one JSON object a line:

    {"do": "load", "loader": "module:function", "arguments": {…}, "threads": 2}   → facts of what was loaded
    {"do": "time", "calls": 5, "untimed": 1}                                      → {"ms": [5 times]}
    {"do": "memory"}                                                              → bytes, and CPU seconds so far

A loader is a function of a module, or of a Python file, that takes ``arguments`` and gives a :class:`Ready`. What
libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optpass.errors import UserError


@dataclass(frozen=True)
class Ready:
    """A loaded engine: ``run`` does one measured piece of work and returns when it is done.

    ``calls`` is by how many a piece's time is divided, ``items`` what each of those makes (a batch's). ``interface``
    is what contestants must have in common, as text by name, where there is one; ``facts`` go into the result.
    """

    run: Callable[[], None]
    calls: int = 1
    items: int = 1
    interface: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """Answers requests: ``loaded_at`` is the memory before the engine came, ``device`` what that took of CUDA."""

    def __init__(self) -> None:
        self.ready: Ready | None = None
        self.loaded_at = 0
        self.device: int | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            UserError: as the loader, or there is nothing loaded.
        """
        match request:
            case {"do": "load", "loader": str(loader), "arguments": arguments, "threads": threads}:
                return self._load(loader, arguments, threads)
            case {"do": "time", "calls": int(calls), "untimed": int(untimed)}:
                return self._time(calls, untimed)
            case {"do": "memory"}:
                return self._memory()
        raise UserError(f"a benchmark's worker is not asked for {dict(request)}")

    def _load(self, loader: str, arguments: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
        if threads:
            torch.set_num_threads(threads)
        function = _function(loader)
        _forget_peak()
        self.loaded_at, free = _status("VmRSS"), _free_on_device()
        self.ready = function(**arguments)
        if free is not None:
            # What others load later would count below; nobody gives memory back that a call took.
            self.ready.run()
            self.device = max(0, free - (_free_on_device() or 0)) or None
        return {
            "items": self.ready.items,
            "interface": dict(self.ready.interface),
            "facts": {"threads": torch.get_num_threads(), **self.ready.facts},
        }

    def _time(self, calls: int, untimed: int) -> dict[str, Any]:
        assert self.ready is not None
        for _ in range(untimed):
            self.ready.run()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            self.ready.run()
            times.append((time.perf_counter() - start) * 1e3 / self.ready.calls)
        return {"ms": times}

    def _memory(self) -> dict[str, Any]:
        return {
            "process": self.loaded_at,
            "peak": _status("VmHWM"),
            "device": self.device,
            "cpu_seconds": time.process_time(),
        }


def _function(loader: str) -> Callable[..., Ready]:
    """The loader of ``module:function`` or ``file.py:function``."""
    place, _, name = loader.rpartition(":")
    if not place.endswith(".py"):
        found: Callable[..., Ready] = getattr(importlib.import_module(place), name)
        return found
    path = Path(place)
    sys.path.insert(0, str(path.parent))
    return _function(f"{path.stem}:{name}")


def _free_on_device() -> int | None:
    """Free bytes of the CUDA device, a context of ours on it already; ``None`` where there is none."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def _status(key: str) -> int:
    """A figure of ``/proc/self/status`` in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def _forget_peak() -> None:
    """The peak of resident memory begins anew: what was imported counts no more, where the kernel allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except KeyboardInterrupt:
            return
        except UserError as error:
            answer = {"refused": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
