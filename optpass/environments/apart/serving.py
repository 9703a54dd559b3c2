"""The other side of :mod:`optpass.environments.worker`: requests in, answers out, the vendor's chatter to a file.

``python -I serving.py WORKER.py FOLDER`` runs WORKER.py once, then answers requests, one JSON object a line: on
standard input ``{"command": NAME, ...}``, on the original standard output ``{"result": ...}`` of its function NAME, or
``{"error": {...}}``. Whatever is printed, from Python or from C, goes to ``FOLDER/log.txt``. Worker files import this
module as ``serving``, and what lies beside it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import Any

LOG = "log.txt"
MESSAGE = 1000


def mapped(path: str, specs: list[dict[str, Any]]) -> list[Any]:
    """NumPy arrays over the file ``path``, where ``specs`` say: shape, dtype, offset in bytes."""
    import numpy

    # A map has a dimension at least.
    flat = [numpy.memmap(path, spec["dtype"], "r+", spec["offset"], tuple(spec["shape"]) or (1,)) for spec in specs]
    return [array.reshape(spec["shape"]) for array, spec in zip(flat, specs)]  # noqa: B905 - older Pythons


def logged() -> str:
    """What was printed so far."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(LOG, "rb") as file:
        return file.read().decode("utf-8", "replace")


def told(error: BaseException) -> dict[str, str]:
    """The first cause of ``error``: what compilers wrap it in says where they were, and not what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    kind, message = type(error).__name__, " ".join(str(error).split())
    own = kind == "RefusedError"
    return {"kind": kind, "message": (message if own else f"{kind}: {message}")[:MESSAGE]}


def main() -> None:
    """Answer requests until standard input ends."""
    script, folder = sys.argv[1:3]
    answers, requests = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(0))
    os.chdir(folder)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.modules["serving"] = sys.modules["__main__"]
    # Last, so that nothing here hides a package of the vendor's.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    commands = runpy.run_path(script)
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"result": commands[request.pop("command")](**request)}
        except BaseException as error:
            # SystemExit too: some compilers end the process where they mean to raise.
            traceback.print_exc()
            answer = {"error": told(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
