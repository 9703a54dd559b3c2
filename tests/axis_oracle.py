"""What cutting must equal: the uncut graph, the removed elements of every value held at zero.

A norm's statistics run over what is left, as they would in a model of the smaller width; everything else sees zeros
in place of the removed elements, at full size. Nothing here knows how a graph is rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from optpass.analysis.axes import Axes, Group, axes_of
from optpass.analysis.axes.steps import norm_groups, removable
from optpass.analysis.axes.structure import Kept, Structure, atoms, kept_indices
from optpass.evaluate.difference import outputs_difference
from optpass.evaluate.trials import random_inputs
from optpass.ir.dialect import verify
from optpass.ir.graph import Graph, example_shape
from optpass.ir.program import Program
from optpass.ir.sizes import sizes_of
from optpass.rewrite.cutting import cut

Choice = Mapping[int, tuple[int, ...]]
"""Which indices stay of the groups of a Program, by their number: atoms are others in every analysis."""


def halved(group: Group, step: int = 1) -> tuple[int, ...]:
    """Without about half of the indices, a whole multiple of ``step`` of them, not the last ones."""
    size = group.size
    gone = removable(size, max(step, size / 2), step)
    generator = torch.Generator().manual_seed(size)
    return tuple(sorted(torch.randperm(size, generator=generator)[: size - gone].tolist()))


def choices(found: Axes) -> dict[int, tuple[int, ...]]:
    """About half of every group of which group norms let something go."""
    steps = norm_groups(found)
    halves = {i: halved(group, steps.get(group.atom, 1)) for i, group in enumerate(found.groups)}
    return {i: kept for i, kept in halves.items() if len(kept) < found.groups[i].size}


def cut_errors(program: Program, wanted: Sequence[Choice], seed: int = 1) -> list[float]:
    """For each choice, the worst relative error of the cut Program against the zeroed one; both in float64.

    The cut Program is verified besides, and every value has the shape that its graph says.
    """
    found = axes_of(program)
    examples = {name: random_inputs(graph.inputs_at(), program.ranges, seed) for name, graph in program.entries.items()}
    return [_cut_error(program, found, choice, examples) for choice in wanted]


def _cut_error(program: Program, found: Axes, choice: Choice, examples: Mapping[str, Mapping[str, Tensor]]) -> float:
    kept = {found.groups[i].atom: indices for i, indices in choice.items()}
    after = cut_program(program, choice)
    verify(after)
    errors = [0.0]
    for name, inputs in examples.items():
        graph = program.entries[name]
        expected = zeroed_answer(program, name, found, kept, inputs)
        outputs = dict(zip(graph.signature.outputs, graph.output_node.args[0], strict=True))
        expected = {key: taken(value, found.of(outputs[key]), kept) for key, value in expected.items()}
        placeholders = dict(zip(graph.signature.inputs, graph.placeholders, strict=True))
        fewer = {key: taken(value, found.of(placeholders[key]), kept) for key, value in inputs.items()}
        answer = zeroed_answer(after, name, axes_of(after), {}, fewer)
        errors.append(outputs_difference(expected, answer).relative_error)
    return max(errors)


def cut_program(program: Program, choice: Choice) -> Program:
    """A copy of ``program`` with only the chosen indices of groups."""
    copy = program.copy()
    again = axes_of(copy)
    return cut(copy, again, {again.groups[i].atom: kept for i, kept in choice.items()})


def taken(value: Tensor, dims: Sequence[Structure], kept: Kept) -> Tensor:
    """What stays of ``value``, whose dimensions are ``dims``."""
    for dim, structure in enumerate(dims):
        if _is_cut(structure, kept):
            value = value.index_select(dim, torch.tensor(kept_indices(structure, kept)))
    return value


def check_sizes(program: Program, found: Axes) -> None:
    """Assert that the structures of every value have its sizes."""
    for graph in program.entries.values():
        for node in graph.fx.nodes:
            value = node.meta.get("val")
            several = isinstance(value, (tuple, list))
            results = found.walk.values.get(node, ())
            for dims, item in zip(results, value, strict=True) if several else [(results, value)]:
                if isinstance(item, Tensor):
                    sizes = tuple(structure.size for structure in dims)
                    assert sizes == tuple(sizes_of(item)), f"{node.format_node()}: {dims} of {sizes_of(item)}"


def zeroed_answer(
    program: Program, entry: str, found: Axes, kept: Kept, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What ``entry`` gives in float64 with the removed elements of everything at zero."""
    graph = program.entries[entry]
    weights = {name: program.weights[name].evaluate() for name in graph.weight_names}
    run = _Run(graph, found, kept)
    values: dict[Node, object] = {}
    for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True):
        values[node] = run.masked(node, _wide(inputs[name]))
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
        assert tuple(value.shape) == example_shape(node), node.format_node()
        for dim, structure in enumerate(self.found.of(node)):
            if _is_cut(structure, self.kept):
                removed = torch.ones(structure.size, dtype=torch.bool)
                removed[kept_indices(structure, self.kept)] = False
                value = value.masked_fill(removed.reshape([-1 if i == dim else 1 for i in range(value.ndim)]), 0)
        return value

    def _norm(self, node: Node, values: dict[Node, object]) -> object:
        def stays(operand: Node) -> object:
            return taken(values[operand], self.found.of(operand), self.kept)

        args, kwargs = map_arg((node.args, node.kwargs), stays)
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
