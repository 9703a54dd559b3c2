"""Which values of a graph become integers: a question of the graph and of a target's form, not of any number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.quantization.form import QuantizationForm, WeightScheme

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
LINEARS = frozenset({aten.linear.default})
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
SOFTMAX_PRODUCTS = frozenset({aten.scaled_dot_product_attention.default})
SUMS = frozenset({aten.add.Tensor})
MONOTONE = frozenset(
    {aten.relu.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.max_pool2d.default}
    | {aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.expand.default}
)
"""Operators that give no value that they were not given, or 0: integers pass through them as they are."""

AVERAGES = frozenset({aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim})
"""What stands between a convolutional stream and its classifier."""

ACTIVATIONS = frozenset({aten.relu.default, aten.hardtanh.default})
"""What a kernel of integers does as it rounds the result of a product."""

Reason = Callable[[Node], str]
"""Why an operator is left in floating point; empty when it is not."""


@dataclass(frozen=True)
class Weight:
    """A weight that becomes integers: the operator that reads it, the node that it is read by, its output axis."""

    operator: Node
    read: Node
    axis: int


@dataclass
class Placement:
    """Edges that carry integers, as (value, operator that reads it), the weights, and what was left alone and why.

    Each edge and weight is there once, in the order of execution.
    """

    edges: list[tuple[Node, Node]] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    declined: list[tuple[Node, str]] = field(default_factory=list)

    @property
    def operators(self) -> list[Node]:
        """The operators that read integers, each once."""
        return list(dict.fromkeys(reader for _, reader in self.edges))

    def restricted(self, wanted: Callable[[Node], bool]) -> Placement:
        """Of the operators for which ``wanted`` holds alone."""
        edges = [(value, reader) for value, reader in self.edges if wanted(reader)]
        return Placement(edges, [weight for weight in self.weights if wanted(weight.operator)], self.declined)

    def on(self, graph: Graph) -> Placement:
        """The same in a copy of its graph."""
        nodes = {node.name: node for node in graph.fx.nodes}
        edges = [(nodes[value.name], nodes[reader.name]) for value, reader in self.edges]
        weights = [Weight(nodes[w.operator.name], nodes[w.read.name], w.axis) for w in self.weights]
        return Placement(edges, weights, self.declined)


def weight_axis(node: Node) -> int | None:
    """The output axis of the weight of a convolution or linear ``node``; ``None`` for any other operator.

    Transposed convolutions have it second, where no groups share it.
    """
    if node.target in CONVOLUTIONS or node.target in LINEARS:
        return 0
    return 1 if node.target in TRANSPOSED else None


def weighted(graph: Graph) -> Iterator[Node]:
    """The convolutions and linears of ``graph`` that read a weight of the store, in order of execution."""
    for node in graph.calls:
        if weight_axis(node) is not None and _weight_read(node) is not None:
            yield node


def place_weights(graph: Graph, scheme: WeightScheme, reason: Reason) -> Placement:
    """The weights of linears, activations staying as they are; those whose rows ``scheme`` can cut into its groups.

    Kernels that read integer weights and floating activations are those of matrix products: a convolution's weight
    would be made real again at every call.
    """

    def why(node: Node) -> str:
        if told := reason(node):
            return told
        if node.target not in LINEARS:
            return "no kernel convolves with integer weights and real activations"
        columns = shape_of(node.args[1])[1]  # type: ignore[arg-type]
        uneven = scheme.group_size and columns % scheme.group_size
        return f"its {columns} columns are no multiple of the group's {scheme.group_size}" if uneven else ""

    placement = Placement()
    for node in weighted(graph):
        _take_weight(placement, node, why)
    return placement


def place(graph: Graph, form: QuantizationForm, reason: Reason) -> Placement:
    """Where ``form`` wants integers in ``graph``, of operators for which ``reason`` says nothing."""
    placement = Placement()
    for node in weighted(graph):
        if _take_weight(placement, node, reason):
            placement.edges.append((node.args[0], node))  # type: ignore[arg-type]
    if form.products or form.everything:
        _take_operands(placement, graph, PRODUCTS | SOFTMAX_PRODUCTS, reason, first=2)
    if form.everything:
        _take_rest(placement, graph, reason)
    elif form.sums:
        _take_sums(placement, graph, reason)
    _order(placement, graph)
    return placement


def _take_weight(placement: Placement, node: Node, reason: Reason) -> bool:
    """Add the weight of ``node``, or the reason why not."""
    read, axis = _weight_read(node), weight_axis(node)
    assert read is not None
    assert axis is not None
    why = reason(node)
    if not why and node.target in TRANSPOSED and _groups(node) > 1:
        why = "the output channels of a grouped transposed convolution lie on no axis of its weight"
    if why:
        placement.declined.append((node, why))
        return False
    placement.weights.append(Weight(node, read, axis))
    return True


def _take_operands(
    placement: Placement, graph: Graph, operators: frozenset[object], reason: Reason, first: int
) -> None:
    for node in graph.calls:
        if node.target not in operators:
            continue
        operands = [operand for operand in node.args[:first] if isinstance(operand, Node)]
        if any(operand.op == "get_attr" for operand in operands):
            continue
        if why := reason(node):
            placement.declined.append((node, why))
        else:
            placement.edges += [(operand, node) for operand in dict.fromkeys(operands)]


def _take_sums(placement: Placement, graph: Graph, reason: Reason) -> None:
    """Additions of two values of one shape all of whose readers take integers, from the last one on backwards."""
    integer = set(placement.operators)
    for node in reversed(graph.calls):
        if node.target not in SUMS or node.kwargs or not _adds_alike(node):
            continue
        if _read_as_integers(node, integer) and not reason(node):
            integer.add(node)
            placement.edges += [(operand, node) for operand in dict.fromkeys(node.all_input_nodes)]


def _take_rest(placement: Placement, graph: Graph, reason: Reason) -> None:
    """Every floating value that an operator, or the graph's result, reads: for devices that have integers alone.

    A product and its activation are one kernel.
    """
    taken = set(placement.edges)
    for node in [*graph.calls, graph.output_node]:
        if node.op == "call_function" and reason(node):
            continue
        for operand in dict.fromkeys(node.all_input_nodes):
            computed = operand.op in ("call_function", "placeholder")
            if computed and is_real(operand) and (operand, node) not in taken and not _is_fused(operand, node):
                placement.edges.append((operand, node))


def _is_fused(operand: Node, node: Node) -> bool:
    """Whether ``node`` is the activation of the product ``operand``, which nothing else reads."""
    return node.target in ACTIVATIONS and weight_axis(operand) is not None and len(operand.users) == 1


def is_real(node: Node) -> bool:
    """Whether ``node`` is one tensor of floating numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _order(placement: Placement, graph: Graph) -> None:
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    placement.edges.sort(key=lambda edge: order[edge[1]])


def _adds_alike(node: Node) -> bool:
    operands = node.all_input_nodes
    computed = all(operand.op == "call_function" for operand in operands)
    return computed and len(operands) == 2 and shape_of(operands[0]) == shape_of(operands[1])


def _read_as_integers(node: Node, integer: set[Node]) -> bool:
    """Whether all that reads ``node``, through monotone operators and averages, takes integers."""
    readers, seen = list(node.users), set()
    found = bool(readers)
    while readers and found:
        reader = readers.pop()
        if reader in seen or reader in integer:
            continue
        seen.add(reader)
        found = reader.target in MONOTONE | AVERAGES and bool(reader.users)
        readers += reader.users
    return found


def _weight_read(node: Node) -> Node | None:
    """The ``get_attr`` of the operator's weight, if it is a floating weight read as it is."""
    weight = node.args[1]
    plain = isinstance(weight, Node) and weight.op == "get_attr" and value_of(weight).is_floating_point()
    return weight if plain else None  # type: ignore[return-value]


def _groups(node: Node) -> int:
    return int(argument(node, "groups") or 1)
