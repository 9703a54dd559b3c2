"""The records of a run, written into the bundle: lock file, report as JSON and as a page."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from optpass import __version__
from optpass.jsonable import finite
from optpass.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from optpass.report.clips import Clips

LOCK, REPORT, PAGE = "recipe.lock.yaml", "report.json", "report.html"
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "numpy")


def write_records(folder: Path, recipe: Recipe, report: Mapping[str, Any], clips: Clips | None) -> None:
    """Write ``recipe.lock.yaml``, ``report.json`` and ``report.html`` into ``folder``."""
    from optpass.report.render import render_report

    lock = {**recipe.as_document(), "checkpoint": report["checkpoint"], "tools": tool_versions()}
    if files := _files(report):
        lock["files"] = files
    (folder / LOCK).write_text(yaml.safe_dump(lock, sort_keys=False, allow_unicode=True), "utf-8")
    (folder / REPORT).write_text(json.dumps(finite(report), indent=1), "utf-8")
    (folder / PAGE).write_text(render_report(report, clips=clips), "utf-8")


def _files(report: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that some pass read, of any component."""
    parts = [report, *report.get("components", ())]
    return {path: digest for part in parts for step in part["passes"] for path, digest in step.get("files", {}).items()}


def tool_versions() -> dict[str, str]:
    """Versions of everything that shapes a bundle."""
    found = {"optpass": __version__, "python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the figures of a report were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_text() -> str:
    """The same in words, for pages."""
    found = machine()
    return (
        f"{found['processor']}, {found['cores']} cores; {found['threads']} threads, PyTorch {found['torch']}, "
        f"Python {found['python']}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
