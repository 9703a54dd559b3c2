"""What an environment is made of, and where the one on this machine lies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optpass.errors import UserError

HOME = "OPTPASS_HOME"
OVERRIDE = "OPTPASS_TARGET_PYTHON_"
RECORD = "environment.json"


@dataclass(frozen=True)
class Environment:
    """Packages that live apart from optpass's own, under ``name``; targets with the same packages share one.

    ``first`` is installed before the ``requirements`` and alone, so that no resolver takes another build of it.
    ``pythons`` are the versions that the packages have wheels for, best first; ``gigabytes`` is what the
    installed environment takes on disk. ``licence`` is what a user must know before using it.
    """

    name: str
    requirements: tuple[str, ...]
    gigabytes: float
    licence: str
    first: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.10")

    @property
    def variable(self) -> str:
        """The environment variable that names the interpreter of another environment to use in its place."""
        return OVERRIDE + self.name.upper().replace("-", "_")

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return home() / "targets" / self.name

    def record(self) -> Mapping[str, Any] | None:
        """What was installed, as :func:`~optpass.environments.install.install` wrote it when all was done.

        ``None`` where nothing was, or the record does not read.
        """
        try:
            found = json.loads((self.folder / RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("python"), str) else None

    def lacks(self) -> str:
        """Why it cannot be used on this machine; empty when it can."""
        if given := os.environ.get(self.variable):
            return "" if os.access(given, os.X_OK) else f"{self.variable} names {given}, which is no interpreter"
        record = self.record()
        if record is None:
            return "its environment is not installed here"
        if not os.access(record["python"], os.X_OK):
            return f"its environment is gone: there is no {record['python']}"
        if tuple(record.get("requirements", ())) != (*self.first, *self.requirements):
            return "its environment was installed by another version of optpass"
        return ""

    def interpreter(self, target: str) -> Path:
        """The Python of the environment, for messages about ``target``.

        Raises:
            UserError: it is not installed, or not as this version of optpass needs it.
        """
        if reason := self.lacks():
            again = " --force" if self.record() else ""
            advice = f"install it ({self.gigabytes:g} GB) with: optpass targets install {target}{again}"
            raise UserError(f"target {target!r} cannot be used: {reason}; {advice}")
        return Path(os.environ.get(self.variable) or str((self.record() or {})["python"]))


def home() -> Path:
    """The user's folder for what optpass installs: ``$OPTPASS_HOME``, else the platform's place for user data."""
    if given := os.environ.get(HOME):
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "optpass"
