"""What cutting must equal: the uncut graph, the removed elements of every value held at zero.

A norm's statistics run over what is left, as they would in a model of the smaller width; everything else sees zeros
in place of the removed elements, at full size. Nothing here knows how a graph is rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from optpass.analysis.axes import Axes, Group
from optpass.analysis.axes.structure import Kept, Structure, atoms, kept_indices
from optpass.ir.graph import Graph
from optpass.ir.program import Program


def halved(group: Group, multiple: int = 1) -> tuple[int, ...]:
    """About every second index, a whole ``multiple`` of them, not the first ones."""
    size = group.size
    count = max(multiple, size // 2 // multiple * multiple)
    generator = torch.Generator().manual_seed(size)
    return tuple(sorted(torch.randperm(size, generator=generator)[:count].tolist()))


def zeroed_answer(
    program: Program, entry: str, found: Axes, kept: Kept, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What ``entry`` gives in float64 with the removed elements of everything at zero."""
    graph = program.entries[entry]
    weights = {name: program.weights[name].evaluate() for name in graph.weight_names}
    run = _Run(graph, found, kept)
    values: dict[Node, object] = {}
    for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True):
        values[node] = _wide(inputs[name])
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            values[node] = run.masked(node, _wide(weights[str(node.target)]))
        elif node.op == "call_function":
            values[node] = run.call(node, values)
    outputs = graph.output_node.args[0]
    return {name: values[node] for name, node in zip(graph.signature.outputs, outputs, strict=True)}


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


class _Run:
    def __init__(self, graph: Graph, found: Axes, kept: Kept) -> None:
        self.found, self.kept = found, kept
        self.norms = {item.node for item in found.normalised if _is_cut(item.structure, kept)}

    def call(self, node: Node, values: dict[Node, object]) -> object:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node in self.norms:
            return self._norm(node, values)
        if node.target is torch.ops.aten.to.dtype and args[1].is_floating_point:
            args = (args[0], torch.float64)
        with torch.no_grad():
            return self.masked(node, _widened(node.target(*args, **kwargs)))

    def masked(self, node: Node, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        for dim, structure in enumerate(self.found.of(node)):
            if _is_cut(structure, self.kept):
                removed = torch.ones(structure.size, dtype=torch.bool)
                removed[kept_indices(structure, self.kept)] = False
                value = value.masked_fill(removed.reshape([-1 if i == dim else 1 for i in range(value.ndim)]), 0)
        return value

    def _norm(self, node: Node, values: dict[Node, object]) -> object:
        def taken(operand: Node) -> object:
            value = values[operand]
            for dim, structure in enumerate(self.found.of(operand)):
                if _is_cut(structure, self.kept):
                    value = value.index_select(dim, torch.tensor(kept_indices(structure, self.kept)))
            return value

        args, kwargs = map_arg((node.args, node.kwargs), taken)
        if "layer_norm" in str(node.target) or "rms_norm" in str(node.target):
            args = (args[0], list(args[0].shape[-len(args[1]) :]), *args[2:])
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        for dim, structure in enumerate(self.found.of(node)):
            if _is_cut(structure, self.kept):
                shape = [structure.size if i == dim else n for i, n in enumerate(value.shape)]
                index = torch.tensor(kept_indices(structure, self.kept))
                value = torch.zeros(shape, dtype=value.dtype).index_copy(dim, index, value)
        return value


def _widened(value: object) -> object:
    # What a graph makes itself (ones, arange) is float32.
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _is_cut(structure: Structure, kept: Kept) -> bool:
    return any(atom in kept for atom in atoms(structure))
