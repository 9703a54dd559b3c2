"""The parts of a pipeline folder that no pass touches: carried beside the engine as they are."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from optpass.errors import UserError
from optpass.ir.hashing import copy_hashed
from optpass.ir.program import Origin

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data"})
CODE_SUFFIXES = frozenset({".py", ".pyc", ".so", ".dll", ".dylib"})


def component_files(origin: Origin, optimised: Collection[str] = ()) -> dict[str, Path]:
    """Files to carry, by path relative to the pipeline folder.

    Everything but code, hidden files, single-file checkpoints beside ``model_index.json``, and the
    weights of the components that were ``optimised`` (by default ``origin.component`` alone), whose
    configurations stay.

    Raises:
        UserError: a link leaves the pipeline folder (a download cache's own links excepted).
    """
    folder = origin.path
    if folder is None or not origin.pipeline:
        return {}
    without = [folder / name for name in optimised or (origin.component,)]
    return {str(path.relative_to(folder)): path for path in _walk(folder) if _is_carried(path, folder, without)}


def copy_components(origin: Origin, destination: Path, optimised: Collection[str] = ()) -> dict[str, str]:
    """Copy :func:`component_files` under ``destination``; links arrive as the files they name.

    Returns the hex SHA-256 of every copy by its path relative to ``destination``.

    Raises:
        UserError: as :func:`component_files`.
    """
    digests = {}
    for name, source in component_files(origin, optimised).items():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digests[Path(name).as_posix()] = copy_hashed(source, target)
    return digests


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in [*folders, *sorted(files)]:
            path = Path(parent, name)
            if path.is_symlink():
                _check_link(path, folder)
            if path.is_file() and not name.startswith("."):
                yield path


def _check_link(path: Path, folder: Path) -> None:
    target, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        # The hub's cache keeps every file of a snapshot as a link into its sibling "blobs".
        allowed.append(home.parent.parent / "blobs")
    if path.is_dir() or not any(target.is_relative_to(parent) for parent in allowed):
        raise UserError(f"{path} is a link that leaves the checkpoint's folder; put the file itself in its place")


def _is_carried(path: Path, folder: Path, without: Collection[Path]) -> bool:
    if path.suffix in CODE_SUFFIXES:
        return False
    if path.parent == folder:
        return path.suffix not in WEIGHT_SUFFIXES
    if not any(path.is_relative_to(part) for part in without):
        return True
    return path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json")
