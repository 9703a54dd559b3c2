"""A process in a vendor's environment that answers requests, and what its ends mean to the user."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from optpass.environments.environment import home
from optpass.errors import UserError
from optpass.ir.graph import TensorSpec

SERVING = Path(__file__).with_name("apart") / "serving.py"
ALIGNMENT = 64
TAIL = 3
CHUNK = 1 << 16
KEPT_LOGS = 20
SIGNALS = {
    signal.SIGKILL: "was killed (signal 9): most likely the machine ran out of memory",
    signal.SIGSEGV: "crashed (signal 11, segmentation fault): a fault of its own",
    signal.SIGABRT: "aborted (signal 6)",
}


class WorkerError(UserError):
    """A worker failed: the vendor's own words, ``kind`` of the exception, and its ``log``."""

    def __init__(self, message: str, *, kind: str = "", log: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.log = log


class Worker:
    """A process that runs ``script`` in the environment of ``python``; ``name`` is the target's, for messages.

    The process has a folder of its own, ``folder``, as its working directory. It ends with :meth:`close`, or when
    nobody holds the object any more. ``time_limit`` bounds every request, in seconds; 0 does not.
    """

    def __init__(self, name: str, python: Path, script: Path, *, time_limit: float = 0) -> None:
        self.name, self.time_limit = name, time_limit
        self.folder = Path(tempfile.mkdtemp(prefix=f"optpass-{name}-"))
        command = [str(python), "-I", "-X", "faulthandler", str(SERVING), str(script), str(self.folder)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"target {name!r}: {python} cannot be run: {error}") from error
        self._unread = b""
        self._finalizer = weakref.finalize(self, _end, self._process, self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove its folder."""
        self._finalizer()

    def ask(self, command: str, **request: Any) -> Any:
        """What the script's function ``command`` returns for ``request``, both as JSON.

        Raises:
            WorkerError: it raised something, the process ended, or the time limit passed; the message has the
                vendor's own words, and the whole log is kept where it says.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **request}).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line())
        except (BrokenPipeError, EOFError):
            raise self._ended() from None
        if "error" in answer:
            kind, message = answer["error"]["kind"], answer["error"]["message"]
            raise self._failed(message or kind, kind=kind)
        return answer["result"]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.time_limit if self.time_limit else None
        while b"\n" not in self._unread:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                raise self._failed(f"took longer than time_limit: {self.time_limit:g} seconds; it was ended")
            found = os.read(self._process.stdout.fileno(), CHUNK)
            if not found:
                raise EOFError
            self._unread += found
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> WorkerError:
        status = self._process.wait()
        if status >= 0:
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode("utf-8", "replace").strip() or self._log()
            return self._failed(f"ended with exit status {status}: {_tail(said, 1)}")
        if -status in SIGNALS:
            return self._failed(SIGNALS[signal.Signals(-status)])
        return self._failed(f"was ended by signal {-status}")

    def _failed(self, message: str, *, kind: str = "") -> WorkerError:
        log = self._log()
        kept = _keep_log(self.name, log)
        return WorkerError(f"target {self.name!r}: {message} (its whole log: {kept})", kind=kind, log=log)

    def _log(self) -> str:
        try:
            return (self.folder / "log.txt").read_text("utf-8", "replace")
        except OSError:
            return ""


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            try:
                stream.close()
            except OSError:
                continue
    shutil.rmtree(folder, ignore_errors=True)


def _tail(text: str, count: int = TAIL) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-count:]) or "it said nothing"


def _keep_log(name: str, log: str) -> Path:
    """The file that ``log`` is kept in; the oldest of many are removed."""
    folder = home() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path.write_text(log, "utf-8")
    return path


class RemoteEngine:
    """An engine that is open in a worker, called as any other.

    The tensors of a call lie in a file that both processes map, so that a call costs a message and a copy.
    """

    def __init__(
        self, worker: Worker, engine: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self.worker = worker
        path, size = worker.folder / f"tensors-{time.monotonic_ns()}", 0
        records: list[dict[str, Any]] = []
        for spec in (*inputs, *outputs):
            shape, dtype = [int(extent) for extent in spec.shape], _numpy_dtype(spec.dtype)
            records.append({"name": spec.name, "shape": shape, "dtype": dtype, "offset": size})
            size += -(-max(int(np.prod(shape)), 1) * spec.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        path.write_bytes(bytes(max(size, 1)))
        arrays = [
            np.memmap(path, each["dtype"], "r+", each["offset"], tuple(each["shape"]) or (1,)) for each in records
        ]
        tensors = [torch.from_numpy(array).reshape(each["shape"]) for array, each in zip(arrays, records, strict=True)]
        self._inputs = dict(zip((spec.name for spec in inputs), tensors, strict=False))
        self._outputs = dict(zip((spec.name for spec in outputs), tensors[len(inputs) :], strict=True))
        places = {"inputs": records[: len(inputs)], "outputs": records[len(inputs) :]}
        worker.ask("load", engine=str(engine), tensors=str(path), **places)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            WorkerError: the engine fails, or its process ended.
        """
        for name, place in self._inputs.items():
            place.copy_(tensors[name])
        self.worker.ask("call")
        return {name: value.clone() for name, value in self._outputs.items()}


def _numpy_dtype(dtype: torch.dtype) -> str:
    return str(torch.empty((), dtype=dtype).numpy().dtype)
