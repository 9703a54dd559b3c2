"""``optpass inspect``: a checkpoint's entries, inputs and costs as one JSON-able record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optpass.analysis.axes import axes_of
from optpass.analysis.axes.record import axes_record
from optpass.analysis.cost import measure
from optpass.capture.precision import AUTO, precision
from optpass.capture.sources import capture
from optpass.capture.spans import Sizes
from optpass.ir.program import Program


def inspect_program(
    checkpoint: str,
    *,
    inputs: Sizes | None = None,
    weights: Path | None = None,
    component: str | None = None,
    depth: int = 2,
    groups: bool = False,
    trust_remote_code: bool = False,
    dtype: str = AUTO,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> tuple[Program, dict[str, Any]]:
    """Capture ``checkpoint`` structure-only where possible and measure it; executes nothing.

    With ``groups`` the record has ``axes`` too: what may be cut, and what may not.

    Raises:
        UserError: the checkpoint cannot be captured.
    """
    progress("capture", 0.0)
    program = capture(
        checkpoint,
        inputs=inputs,
        weights=weights,
        component=component,
        trust_remote_code=trust_remote_code,
        dtype=precision(dtype),
    )
    progress("capture", 1.0)
    cost = measure(program)
    record = cost.as_json()
    for name, graph in program.entries.items():
        record["entries"][name] |= {
            "nodes": len(graph.calls),
            "inputs": [spec.as_json() for spec in graph.inputs],
            "outputs": [spec.as_json() for spec in graph.outputs],
            "dimensions": [item.as_json() for item in graph.dimensions],
            "guards": list(graph.dimensions.guards),
            "by_module": cost.entries[name].by_module(depth),
            "by_operator": cost.entries[name].by_operator(),
        }
    if groups:
        record["axes"] = axes_record(program, axes_of(program))
    origin = program.origin.as_json()
    checkpoint_facts = {key: origin[key] for key in ("name", "kind", "class", "component", "pipeline")}
    return program, {"checkpoint": {**checkpoint_facts, "has_weights": program.has_values}, **record}
