"""The table of models: every case of ``tests/models`` run at its small size, its full config captured."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "tests" / "models"
FAMILIES = ("diffusers", "transformers", "timm")
COLUMNS = (
    "model", "full: parameters, M", "GMAC", "nodes", "CPU s", "peak MB",
    "small: nodes", "ONNX nodes", "Program, rel. error", "ONNX Runtime, rel. error", "open dimensions", "note",
)  # fmt: skip
INTRODUCTION = """# The models

**full**: the published configuration, captured structure-only by `optpass inspect` (no weights are read; a batch of 1
at the size it was trained for). **small**: the same classes in a small configuration with random weights, saved by
their library, captured, lowered, and run: the relative error is max|a−b| / max|a| against the eager model, for the
captured Program in PyTorch and for the engine in ONNX Runtime. **open dimensions** stay open from capture to engine:
one engine is compared with eager at both ends of their ranges. What does not work has its reason, and a test of
`tests/models` that expects exactly that error."""

Measure = Callable[..., Any]
"""Runs the command: ``record``, ``cpu_seconds``, ``megabytes``."""


def models(measure: Measure, path: Path, families: tuple[str, ...] = FAMILIES) -> str:
    """The whole table, of which the sections of other families are taken from ``path`` as they are."""
    sys.path.insert(0, str(ZOO))
    sections = _written(path)
    for family in families:
        if (ZOO / f"cases_{family}.py").is_file():
            sections[family] = _section(family, measure)
    return "\n\n".join([INTRODUCTION, *(sections[family] for family in FAMILIES if family in sections)])


def _written(path: Path) -> dict[str, str]:
    """The sections of the table as it is, by family."""
    text = path.read_text("utf-8").partition("\n\nPrinted by")[0] if path.exists() else ""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.split()[1]: part.strip() for part in parts}


def _section(family: str, measure: Measure) -> str:
    cases = importlib.import_module(f"cases_{family}").CASES
    lines = [f"## {family}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for case in cases:
        row = [case.name, *_full(case, measure), *_small(case), _open(case), _note(case)]
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def _full(case: Any, measure: Measure) -> list[str]:
    if not case.full:
        return [""] * 5
    import zoo

    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"--inputs={name}={'x'.join(map(str, shape))}" for name, shape in case.full_inputs.items()]
        part = [f"--component={case.component}"] if case.component else []
        run = measure("inspect", str(zoo.config_file(case.full, Path(folder))), *sizes, *part)
    totals, [entry] = run.record["totals"], run.record["entries"].values()
    numbers = (totals["parameters"] / 1e6, totals["macs"] / 1e9)
    return [
        *(f"{number:,.1f}" for number in numbers),
        str(entry["nodes"]),
        f"{run.cpu_seconds:.0f}",
        f"{run.megabytes:.0f}",
    ]


def _small(case: Any) -> list[str]:
    import zoo

    with tempfile.TemporaryDirectory() as folder:
        facts = zoo.run(case, Path(folder))
    zoo.check(case, facts)
    errors = (facts.program_error, facts.engine_error)
    counts = [str(count) if count else "" for count in (facts.nodes, facts.onnx_nodes)]
    return [*counts, *("" if error is None else f"{error:.1e}" for error in errors)]


def _open(case: Any) -> str:
    starts = {name: low for name, (low, _) in case.spans.items()}
    return ", ".join(f"{name} ≥ {starts[name]}" if name in starts else name for name in case.dynamic)


def _note(case: Any) -> str:
    stages: dict[str, list[str]] = {}
    for stage, reason in case.limits.items():
        stages.setdefault(_plain(reason), []).append(stage.removeprefix("dynamic:").replace(",", " with "))
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in stages.items()]
    return "; ".join([*([case.note] if case.note else []), *reasons]).replace("|", "\\|")


def _plain(pattern: str) -> str:
    """A regular expression as the text that it expects."""
    return re.sub(r"\\(.)", r"\1", pattern.replace(".*", " … "))
