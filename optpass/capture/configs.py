"""A checkpoint's JSON files: read, checked for what would run code or leave the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optpass.errors import UserError
from optpass.untrusted import read_json

CONFIG = "config.json"
PIPELINE_INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
"""What pipelines call the model that their loop runs."""
MODULE_OF = "module of "
"""In front of the kind of source, where a module was captured out of its model."""


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
