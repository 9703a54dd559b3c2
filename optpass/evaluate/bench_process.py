"""The measuring side of a contestant: a process of its own that is spoken to over pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from optpass.errors import OptpassError, UserError

WORKER = "optpass.evaluate.bench_worker"
LAST_WORDS = 2000
"""Letters of a dead worker's stderr that its error quotes."""


@dataclass(frozen=True)
class Contestant:
    """Something to be measured: a ``label``, and what makes it in a process of its own.

    ``loader`` is ``module:function`` or ``file.py:function``, which takes ``arguments`` (JSON) and gives an
    :class:`~optpass.evaluate.bench_worker.Ready`.
    """

    label: str
    loader: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Process:
    """A contestant's process. Nothing in it runs while it is not asked.

    ``facts``, ``items`` and ``interface`` are the loader's, once :meth:`load` was called.
    """

    def __init__(self, contestant: Contestant, threads: int | None = None) -> None:
        self.contestant = contestant
        self.threads = threads
        self.facts: Mapping[str, Any] = {}
        self.interface: Mapping[str, str] = {}
        self.items = 1
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        limits = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **limits},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def load(self) -> None:
        """Make the engine.

        Raises:
            UserError: the loader refuses, or the process was killed (for want of memory, as a rule).
            OptpassError: the loader failed.
        """
        found = self._ask(
            do="load",
            loader=self.contestant.loader,
            arguments=dict(self.contestant.arguments),
            threads=self.threads,
        )
        self.facts, self.interface, self.items = found["facts"], found["interface"], int(found["items"])

    def time(self, calls: int, untimed: int = 0) -> list[float]:
        """Milliseconds of each of ``calls`` calls, after so many that are not timed.

        Raises:
            UserError, OptpassError: as :meth:`load`.
        """
        return [float(taken) for taken in self._ask(do="time", calls=calls, untimed=untimed)["ms"]]

    def memory(self) -> dict[str, Any]:
        """Bytes of the ``process`` before the engine came, at its ``peak`` since then and on the ``device``."""
        return self._ask(do="memory")

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        line = stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise UserError(f"{self.contestant.label}: {answer['refused']}")
        if "failed" in answer:
            raise OptpassError(f"{self.contestant.label} failed: {answer['failed']}\n{self._said()}")
        return answer

    def _died(self) -> OptpassError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return UserError(f"{self.contestant.label}: its process was killed, for want of memory as a rule")
        return OptpassError(f"{self.contestant.label}: its process ended with status {code}\n{self._said()}")

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-LAST_WORDS:]
