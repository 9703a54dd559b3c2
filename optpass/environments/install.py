"""Making an environment: a virtual one, filled by pip, checked, and only then recorded."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optpass import __version__
from optpass.environments.environment import RECORD, Environment
from optpass.errors import UserError
from optpass.runtime.workfolder import alone

LOG = "install.log"
GIGABYTE = 10**9
SLACK = 1.5
"""Room on disk, as a multiple of the installed size: pip unpacks each wheel beside its archive."""
SHOWN = 3

Progress = Callable[[str, float], None]


def install(
    environment: Environment,
    *,
    path: Path | None = None,
    force: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> Mapping[str, Any]:
    """Install ``environment`` under its folder, or its packages at ``path``; the record of what was installed.

    The record is written last and at once, so that what an interrupted installation leaves is never taken for a
    whole environment; the next one removes it. With ``force`` an installed one is replaced, and stays in use
    until the new one is whole.

    Raises:
        UserError: it is installed already, the disk has no room, no Python fits, pip fails, or what it
            installed does not fit together.
    """
    if not environment.lacks() and environment.record() and not force:
        raise UserError(f"{environment.name} is installed in {environment.folder}; replace it with --force")
    environment.folder.mkdir(parents=True, exist_ok=True)
    with alone(environment.folder):
        before = environment.record()
        _remove_unrecorded(environment.folder, before)
        place = path.absolute() if path else environment.folder / f"venv-{secrets.token_hex(4)}"
        if path and path.exists():
            raise UserError(f"{path} exists; give --path a folder that does not")
        _check_room(environment, place.parent)
        try:
            record = _filled(environment, place, progress)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        _write_record(environment.folder / RECORD, record)
        if before and before.get("folder") != record["folder"]:
            shutil.rmtree(str(before.get("folder")), ignore_errors=True)
    return record


def _filled(environment: Environment, place: Path, progress: Progress) -> dict[str, Any]:
    """The new environment at ``place``, installed and checked; its record."""
    log = environment.folder / LOG
    log.write_bytes(b"")
    python = place / "bin" / "python"
    progress("make the environment", 0.0)
    _run([str(_base_python(environment)), "-m", "venv", str(place)], log, "no virtual environment can be made")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    steps = [[each] for each in environment.first] + [list(environment.requirements)]
    for wanted in steps:
        progress(f"install {' '.join(wanted)}", 0.0)
        constraints = [option for each in environment.first for option in ("--constraint", _constraint(place, each))]
        _run([*pip, "install", "--progress-bar", "off", *constraints, *wanted], log, f"pip cannot install {wanted[-1]}")
    progress("check", 0.0)
    _run([*pip, "check"], log, "the installed packages do not fit together")
    installed = _run([*pip, "freeze"], log, "pip cannot list what it installed").split()
    progress("check", 1.0)
    return {
        "name": environment.name,
        "optpass": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(place),
        "python": str(python),
        "requirements": [*environment.first, *environment.requirements],
        "installed": installed,
    }


def _constraint(place: Path, requirement: str) -> str:
    """A file that pins ``requirement``, for pip."""
    file = place / f"{requirement.split('=', 1)[0]}.constraint.txt"
    file.write_text(f"{requirement}\n", "utf-8")
    return str(file)


def _run(command: Sequence[str], log: Path, failure: str) -> str:
    """What ``command`` prints; all of it goes to ``log`` too.

    Raises:
        UserError: it fails; the message says ``failure`` and why, in the command's own words.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=_own_environment())
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit status {done.returncode}"]
        raise UserError(f"{failure}: {'; '.join(said[-SHOWN:])} (all of it: {log})")
    return done.stdout


def _own_environment() -> dict[str, str]:
    """This process's variables without those that would lead another Python to our packages."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _base_python(environment: Environment) -> Path:
    """This Python where its version fits, else the best that is found.

    Raises:
        UserError: none fits.
    """
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if ours in environment.pythons:
        return Path(sys.executable)
    for version in environment.pythons:
        if found := shutil.which(f"python{version}"):
            return Path(found)
    raise UserError(
        f"{environment.name} needs Python {' or '.join(environment.pythons)}; this is {ours}, and none of them is found"
    )


def _check_room(environment: Environment, folder: Path) -> None:
    """
    Raises:
        UserError: the disk is too full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free / GIGABYTE, environment.gigabytes * SLACK
    if free < needed:
        raise UserError(f"{environment.name} needs {needed:.1f} GB in {folder}, and {free:.1f} GB are free; see --path")


def _remove_unrecorded(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Remove what installations that were interrupted left."""
    for leftover in folder.glob("venv-*"):
        if record is None or str(leftover) != record.get("folder"):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(record, indent=1), "utf-8")
    unfinished.replace(path)
    with suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
