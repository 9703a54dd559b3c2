"""A residual stream past its branches: the value that it would have if nothing had been added to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.fx import Node, map_arg

from optpass.analysis.carriers import REARRANGEMENTS, carried_from, joined, whole_of
from optpass.analysis.layouts import contiguous, regrouped
from optpass.analysis.operators import aten
from optpass.analysis.permutations import permutation_of
from optpass.analysis.residuals import Residual
from optpass.ir.graph import Graph, example_shape, path_of, shape_of


class NotCarriedError(Exception):
    """A stream does not come from where it was expected to; the text says what stands between."""


def shortcut(graph: Graph, value: Node, start: Collection[Node], found: Mapping[Node, Residual]) -> Node:
    """What ``value`` would be if every branch between ``start`` and it were zero.

    ``found`` are the residual additions by their ``add``. Views and scalings on the way are repeated at the
    insertion point, unless they put everything back in its place; so are joins of several streams.

    Raises:
        NotCarriedError: the stream does not lead back to ``start``.
    """
    steps: list[Node] = []
    node = value
    while node not in start:
        if node in found:
            node = found[node].carrier
        elif parts := joined(node):
            made = [shortcut(graph, part, start, found) for part in parts]
            node = graph.call(node.target, made, *node.args[1:], like=node, **dict(node.kwargs))
            return _repeated(graph, node, steps)
        elif (before := carried_from(node)) is not None:
            # Parts that are put together again are the value itself.
            steps += [node] if whole_of_cat(node) is None else []
            node = before
        else:
            raise NotCarriedError(f"the stream passes %{node.name} ({path_of(node)}), which computes on it")
    return _repeated(graph, node, steps)


def unmoved(graph: Graph, node: Node) -> Node:
    """The earliest value that ``node`` is, all rearrangements between the two undoing one another; else ``node``."""
    found, steps, current = node, list[Node](), node
    while current.target in REARRANGEMENTS:
        steps.append(current)
        current = current.all_input_nodes[0]
        if _in_place(graph, current, steps):
            found = current
    return found


def whole_of_cat(node: Node) -> Node | None:
    """The value that ``node`` puts together from all of its parts; ``None`` for other operators."""
    return whole_of(node) if node.target in (aten.cat.default, aten.concat.default) else None


def _repeated(graph: Graph, source: Node, steps: Sequence[Node]) -> Node:
    """``steps``, the last of which comes first, over ``source``."""
    if not steps or _in_place(graph, source, steps):
        return source
    for step in reversed(steps):
        operand = carried_from(step)
        args, kwargs = _with_operand((step.args, dict(step.kwargs)), operand, source)
        source = graph.call(step.target, *args, like=step, **kwargs)
    return source


def _in_place(graph: Graph, source: Node, steps: Sequence[Node]) -> bool:
    # Where a size that stays open is 1 in the example, moving its axis leaves no trace there.
    return 1 not in graph.dimensions.examples.values() and _undo_one_another(source, steps)


def _with_operand(arguments: Any, operand: Node | None, source: Node) -> Any:
    return map_arg(arguments, lambda node: source if node is operand else node)


def _undo_one_another(source: Node, steps: Sequence[Node]) -> bool:
    """Whether the rearrangements ``steps``, last first, leave every element in its place."""
    if any(step.target not in REARRANGEMENTS or step.target is aten.to.dtype for step in steps):
        return False
    start = contiguous(example_shape(source))
    axes = start
    for step in reversed(steps):
        order = permutation_of(step)
        after = tuple(axes[dim] for dim in order) if order else regrouped(axes, example_shape(step))
        if after is None:
            return False
        axes = after
    return axes == start and shape_of(steps[0]) == shape_of(source)
