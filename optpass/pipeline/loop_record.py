"""What the report says of a loop: its schedule, what lives between steps, and what a generation costs."""

from __future__ import annotations

import math
from typing import Any

from optpass.analysis.cost import measure
from optpass.analysis.generation import generation_cost, variant_at
from optpass.ir.guards import size_at
from optpass.ir.loop import Loop, usual_steps
from optpass.ir.program import Program

STEPS = 20
"""Of the generation that is reckoned, where nothing says how many."""


def loop_record(original: Program, program: Program, steps: int | None) -> dict[str, Any] | None:
    """The report's ``loop`` section; ``None`` where every step is one call of one entry.

    ``steps`` are those of the generation that is reckoned, unless schedule or model were made for another number.
    States are counted at the captured sizes.
    """
    loop = program.loop
    if loop is None or loop.stateless or original.loop is None:
        return None
    count = usual_steps(loop, steps or STEPS)
    record, cost = loop.as_json(), measure(program)
    sizes = {item.name: item.example for entry in program.interfaces.values() for item in entry.dimensions}
    states = {
        name: {**record["states"][name], "bytes": _numel(state.shape, sizes) * state.dtype.itemsize}
        for name, state in loop.states.items()
    }
    return {
        "schedule": record["schedule"],
        "variants": {
            name: {"entries": list(chain), "macs": sum(cost.entries[entry].totals.macs for entry in chain)}
            for name, chain in loop.variants.items()
        },
        "once": {name: cost.entries[name].totals.macs for name in loop.once},
        "tables": {name: cost.entries[name].totals.macs for name in loop.tables},
        "states": states,
        "state_bytes": sum(state["bytes"] for state in states.values()),
        "before": generation_cost(original, count).as_json(),
        "after": generation_cost(program, count).as_json(),
        "timeline": _timeline(loop, count),
    }


def _timeline(loop: Loop, steps: int) -> list[str]:
    """The variant of each step; empty where it is decided at run time."""
    found = [variant_at(loop, step) for step in range(steps)]
    return [] if None in found else [str(name) for name in found]


def _numel(shape: tuple[int | str, ...], sizes: dict[str, int]) -> int:
    return math.prod(size if isinstance(size, int) else size_at(size, sizes) for size in shape)
