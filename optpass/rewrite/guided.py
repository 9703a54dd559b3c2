"""A denoiser that also takes the scales of its guidance: embedded like the time, added where the time comes in.

At every linear layer y = W·t through which the embedded time t reaches the sample's own values,

    y ← y + Σₛ silu(Wₛ·e(s) + bₛ),    e(s) = [cos(s·f), sin(s·f)],  f = 10000^(−i/(E/2)), i = 0 … E/2 − 1

for each scale s, with Wₛ and bₛ zero at first, so that the scales change nothing before training. In a UNet these
layers are those of its residual blocks, in a transformer those that modulate its norms.

Source: MoViE, arXiv 2412.06578, section 3.3: an embedding like the time's, and a linear layer with a nonlinearity in
every residual block, added as the time's is. The width of the embedding is not published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from optpass.analysis.boundaries import depending_on
from optpass.analysis.operators import aten
from optpass.ir.graph import PATH, Graph, operators, shape_of, value_of
from optpass.ir.loop import Loop
from optpass.ir.weights import Constant, Expression

PERIOD = 10_000.0
"""Longest wavelength of the embedding, over 2π: that of the time's (Ho et al. 2020)."""


def time_layers(graph: Graph, loop: Loop) -> list[Node]:
    """The linear layers through which the time reaches what depends on the sample, the last ones on its way."""
    of_sample = depending_on(graph, [loop.sample])
    of_time = depending_on(graph, [loop.timestep]) - of_sample
    arriving: set[Node] = set()
    for node in reversed(operators(graph)):
        if node in of_time and any(
            user in of_sample or (user in arriving and not _is_linear(user)) for user in node.users
        ):
            arriving.add(node)
    return [node for node in operators(graph) if node in arriving and _is_linear(node)]


def _is_linear(node: Node) -> bool:
    return bool(node.target == aten.linear.default)


def with_scales(
    graph: Graph, layers: Sequence[Node], scales: Mapping[str, float], width: int
) -> tuple[dict[str, Expression], dict[str, Expression]]:
    """Give ``graph`` an input for each of ``scales`` (defaults by name), embedded in ``width``, added to ``layers``.

    The new weights by name: those to be trained, and tables. A name is the path of its layer and the scale's.

    Raises:
        ValueError: ``layers`` is empty, or the graph has an input of a scale's name.
    """
    learnt: dict[str, Expression] = {}
    frequencies = Constant(torch.exp(torch.arange(width // 2) * (-math.log(PERIOD) / (width // 2))), computed=True)
    tables: dict[str, Expression] = {f"{name}.frequencies": frequencies for name in scales}
    inputs = {name: _input(graph, name, default) for name, default in scales.items()}
    embedded = {name: _embedded(graph, name, node, frequencies, layers[0]) for name, node in inputs.items()}
    for layer in layers:
        total = layer
        with graph.before(layer.next):
            for name, vector in embedded.items():
                total = _added(graph, layer, total, vector, name, learnt)
        _reroute(layer, total)
    return learnt, tables


def _input(graph: Graph, name: str, default: float) -> Node:
    """A scalar input behind all others."""
    graph.signature = graph.signature.with_scalar(name, default)
    with graph.fx.inserting_after(graph.placeholders[-1]):
        node = graph.fx.placeholder(name)
    with graph.mode:
        node.meta = {"val": torch.empty(()), PATH: ""}
    return node


def _embedded(graph: Graph, name: str, scale: Node, frequencies: Constant, first: Node) -> Node:
    """e(s) [1, E], in the precision of the ``first`` layer, in front of it."""
    with graph.before(first):
        table = graph.weight(f"{name}.frequencies", frequencies, like=scale)
        angles = graph.call(aten.mul.Tensor, table, scale, like=scale)
        waves = [graph.call(operator, angles, like=scale) for operator in (aten.cos.default, aten.sin.default)]
        vector = graph.call(aten.unsqueeze.default, graph.call(aten.cat.default, waves, 0, like=scale), 0, like=scale)
        dtype = value_of(first).dtype
        return vector if dtype == torch.float32 else graph.call(aten.to.dtype, vector, dtype, like=scale)


def _added(graph: Graph, layer: Node, total: Node, vector: Node, name: str, learnt: dict[str, Expression]) -> Node:
    """``total`` and what the scale ``name`` makes of its embedding at ``layer``."""
    operand = layer.args[1]
    assert isinstance(operand, Node)
    path = str(operand.target).removesuffix(".weight") if operand.op == "get_attr" else str(layer.meta[PATH])
    rows, columns = shape_of(layer)[-1], shape_of(vector)[-1]
    made = {"weight": torch.zeros(rows, columns), "bias": torch.zeros(rows)}
    weights = {f"{path}.{name}.{leaf}": Constant(value.to(value_of(layer).dtype)) for leaf, value in made.items()}
    learnt.update(weights)
    read = [graph.weight(full, expression, like=layer) for full, expression in weights.items()]
    activated = graph.call(aten.silu.default, graph.call(aten.linear.default, vector, *read, like=layer), like=layer)
    return graph.call(aten.add.Tensor, total, activated, like=layer)


def _reroute(layer: Node, total: Node) -> None:
    """Let everything that read ``layer`` read ``total``, but for the sum itself."""
    added, node = {total}, total
    while (node := node.args[0]) is not layer:  # type: ignore[assignment]
        added.add(node)
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user not in added)
