"""Entries of a loop put together: names of states, their shapes, and the Program with the new ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch.fx import Node

from optpass.ir.graph import Graph
from optpass.ir.loop import PRESENT, Loop, Schedule, State
from optpass.ir.program import Program


def without_loop(program: Program) -> list[str]:
    """Why a pass that changes how steps are made cannot run on ``program``; empty when it can."""
    if program.loop is not None:
        return []
    return ["the model has no loop: none of its inputs is a noisy sample, or none is a timestep"]


def computed_entry(loop: Loop) -> str | None:
    """The one entry that makes every step so far; ``None`` where a pass has split the steps before."""
    chains = list(loop.variants.values())
    return chains[0][0] if len(chains) == 1 and len(chains[0]) == 1 else None


def results(graph: Graph) -> dict[str, Node]:
    """The nodes that ``graph`` returns, by the names of its outputs."""
    return dict(zip(graph.signature.outputs, graph.output_node.args[0], strict=True))  # type: ignore[arg-type]


def unique_name(name: str, taken: Collection[str]) -> str:
    """``name``, or with the smallest number behind it that makes it one of its own."""
    numbered = name
    count = 2
    while numbered in taken:
        numbered, count = f"{name}.{count}", count + 1
    return numbered


def stepped(
    program: Program,
    replaced: str,
    entries: Mapping[str, Graph],
    variants: Mapping[str, tuple[str, ...]],
    schedule: Schedule,
    zeros: Collection[str] = (),
) -> Program:
    """``program`` with ``entries`` in place of ``replaced``, driven by ``schedule``.

    Every state that the new entries write and the loop does not know is added to it; those in ``zeros`` may be
    read before they are written.

    Raises:
        ValueError: the Program has no loop.
    """
    if program.loop is None:
        raise ValueError("a Program without a loop has no steps")
    states = dict(program.loop.states)
    for graph in entries.values():
        for spec in graph.outputs:
            name = spec.name.removeprefix(PRESENT)
            if spec.name.startswith(PRESENT) and name not in states:
                states[name] = State.of(name, spec, "zeros" if name in zeros else "written")
    others = {name: graph for name, graph in program.entries.items() if name != replaced}
    loop = replace(program.loop, variants=dict(variants), schedule=schedule, states=states)
    return replace(program, entries={**others, **entries}, loop=loop)
