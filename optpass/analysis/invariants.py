"""What a sampled model computes anew at every step although it stays the same for a generation, or for a timestep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from torch.fx import Node

from optpass.analysis.dependence import Dependence, dependence
from optpass.analysis.liveness import result_bytes
from optpass.analysis.stored_values import stored_values
from optpass.ir.graph import Graph
from optpass.ir.sizes import is_size


@dataclass(frozen=True)
class Refusal:
    """A value that stays the same and is computed at every step all the same, with the reason."""

    node: Node
    reason: str


@dataclass(frozen=True)
class Invariants:
    """The values to keep: ``constant`` for a generation, ``timed`` for every timestep; what of each is refused.

    ``dependence`` is that of the graph, its sizes read from the constant inputs where these have them.
    """

    constant: Sequence[Node]
    timed: Sequence[Node]
    refused: Sequence[Refusal]
    refused_timed: Sequence[Refusal]
    dependence: Dependence


def invariants(graph: Graph, constant: Sequence[str], timestep: str, *, largest: int) -> Invariants:
    """The least to keep of what depends on the ``constant`` inputs alone, and of what does on ``timestep`` besides.

    A value that is kept for every timestep has at most ``largest`` bytes at the captured sizes, and so has everything
    that it is computed from. Linear in the nodes.
    """
    found = dependence(graph, (*constant, timestep))
    fixed = found.mask(constant)
    known = {node for node in graph.fx.nodes if node.op != "output" and found.within(node, fixed)}
    timed, too_large = _timed(graph, known, found, fixed | found.mask({timestep}), largest)
    outside = [name for name in found.inputs if name not in (*constant, timestep)]
    return Invariants(
        stored_values(graph, known),
        stored_values(graph, timed),
        [*_drawn(graph, found, fixed), *_sized(graph, found, fixed, known, outside)],
        too_large,
        found,
    )


def _timed(
    graph: Graph, known: Set[Node], found: Dependence, mask: int, largest: int
) -> tuple[set[Node], list[Refusal]]:
    """What follows from the timestep and from ``known`` values, all of them small; what is not for being large."""
    timed: set[Node] = set()
    refused: list[Refusal] = []
    for node in graph.fx.nodes:
        if node.op == "output" or node in known or not found.within(node, mask):
            continue
        operands = node.all_input_nodes
        if not all(operand in known or operand in timed for operand in operands):
            continue
        # A weight lies in the engine that makes the value, and not beside it.
        size = max(result_bytes(value) for value in (node, *operands) if value is node or found.of[value])
        if size <= largest:
            timed.add(node)
        elif not is_size(node):
            refused.append(Refusal(node, f"{size:,} bytes for every timestep, more than {largest:,}"))
    return timed, refused


def _drawn(graph: Graph, found: Dependence, fixed: int) -> Iterator[Refusal]:
    """Random values where a generation's inputs begin to depend on chance."""
    chance = 1 << len(found.inputs)
    for node in graph.calls:
        operands = [found.contents[operand] for operand in node.all_input_nodes]
        if found.contents[node] & ~fixed == chance and not any(each & chance for each in operands):
            yield Refusal(node, "it is drawn at random, anew at every step")


def _sized(graph: Graph, found: Dependence, fixed: int, known: Set[Node], outside: Sequence[str]) -> Iterator[Refusal]:
    """Where contents that stay the same take a size that no input of the generation has."""
    for node in graph.calls:
        operands = [operand for operand in node.all_input_nodes if not is_size(operand)]
        same = found.contents[node] and not found.contents[node] & ~fixed
        if same and node not in known and all(operand in known for operand in operands):
            yield Refusal(node, f"it takes a size from {', '.join(outside)}, and from no input of a generation")
