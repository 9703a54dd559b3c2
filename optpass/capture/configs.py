"""A checkpoint's JSON files: read, checked for what would run code or leave the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from optpass.errors import UserError

CONFIG = "config.json"
PIPELINE_INDEX = "model_index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, found {type(found).__name__}")
    return found


def config_path(path: Path) -> Path | None:
    """The config of a model folder, or ``path`` itself when it is a bare ``.json`` file; else ``None``."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    candidate = path / CONFIG
    return candidate if candidate.is_file() else None


def model_config(path: Path) -> dict[str, Any]:
    """The configuration of a model folder or bare config file; empty when there is none.

    Raises:
        UserError: as :func:`read_json`.
    """
    found = config_path(path)
    return read_json(found) if found else {}


def inside(folder: Path, name: str, mentioned_by: Path) -> Path:
    """``folder / name``, refused when ``name`` is absolute or leaves ``folder``.

    Links inside the folder are followed: download caches are made of them.

    Raises:
        UserError: it is, or does; ``mentioned_by`` is the file that says ``name``.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = posix.is_absolute() or windows.drive or windows.root or ".." in {*posix.parts, *windows.parts}
    if not name or leaves or not name.isprintable():
        raise UserError(f"{mentioned_by} names {name!r}, which is outside its folder; refused")
    return folder / name


def refuse_remote_code(config: Mapping[str, Any], path: Path, trust: bool) -> None:
    """Refuse a config whose ``auto_map`` points at the checkpoint's own Python code, unless ``trust``.

    Raises:
        UserError: it does.
    """
    if config.get("auto_map") and not trust:
        raise UserError(
            f"{path} asks to run Python code of the checkpoint (auto_map); nothing in a checkpoint runs: "
            "read that code, then pass --trust-remote-code if you trust it"
        )
