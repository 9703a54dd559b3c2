"""Files that somebody else wrote: JSON that may be damaged, names that may leave their folder."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from optpass.errors import UserError


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
