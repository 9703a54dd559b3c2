"""How much attention every token receives: columns of the map softmax(q·kᵀ), written out where it is hidden."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.attention import Attention
from optpass.analysis.attention_cores import Core
from optpass.analysis.operators import argument, aten
from optpass.ir.graph import Graph, shape_of, value_of


def unreadable(attention: Attention, batch: Any) -> str:
    """Why the map of ``attention`` cannot be read as [batch, heads, queries, keys]; empty where it can."""
    core = attention.core
    if core.softmax is None:
        if core.result.node.target is not aten.scaled_dot_product_attention.default:
            return "its kernel gives no map"
        shape, over = shape_of(core.query.node), 3
        if argument(core.result.node, "enable_gqa"):
            return "its heads share keys in one operator"
    else:
        shape, over = shape_of(core.softmax), int(argument(core.softmax, "dim")) % 4
    if len(shape) == 4 and shape[0] == batch and over == 3 and core.query.tokens == 2:
        return ""
    return "its map is not laid out as [batch, heads, queries, keys]"


def attention_map(graph: Graph, core: Core) -> Node:
    """softmax(scale · q·kᵀ); a fused operator becomes two products and a softmax, and gives what it gave.

    The insertion point stays where it is.
    """
    if core.softmax is not None:
        return core.softmax
    fused = core.result.node
    query, key, value = fused.args[:3]
    scale = argument(fused, "scale")
    if scale is None:
        scale = int(shape_of(core.query.node)[-1]) ** -0.5
    with graph.before(fused):
        scaled = graph.call(aten.mul.Tensor, query, scale, like=fused)
        across = graph.call(aten.transpose.int, key, -2, -1, like=fused)
        scores = graph.call(aten.matmul.default, scaled, across, like=fused)
        weights = graph.call(aten.softmax.int, scores, -1, like=fused)
        fused.replace_all_uses_with(graph.call(aten.matmul.default, weights, value, like=fused))
    return weights


def received(
    graph: Graph, weights: Node, like: Node, *, frame: tuple[int, int] | None = None, weight: float = 1.0
) -> Node:
    """What each key receives [batch, tokens] in ``weights`` [batch, heads, queries, keys]: the mean over the others.

    Queries ``frame`` (from, to) count ``weight`` times, as EVAD's key frame does.
    """
    mean = graph.call(aten.mean.dim, weights, [1, 2], like=like)
    if frame is None or weight == 1.0:
        return mean
    queries = int(shape_of(weights)[2])
    rows = graph.call(aten.slice.Tensor, weights, 2, *frame, like=like)
    share = (weight - 1.0) * (frame[1] - frame[0]) / queries
    more = graph.call(aten.mul.Tensor, graph.call(aten.mean.dim, rows, [1, 2], like=like), share, like=like)
    return graph.call(aten.add.Tensor, mean, more, like=like)


def received_by_head(graph: Graph, weights: Node, like: Node) -> Node:
    """What each key receives in every head, 1 on average: [batch, tokens, heads]."""
    mean = graph.call(aten.mean.dim, weights, [2], like=like)
    rows = graph.call(aten.transpose.int, mean, 1, 2, like=like)
    result = graph.call(aten.mul.Tensor, rows, float(shape_of(rows)[1]), like=like)
    # A softmax in float32 inside a half-precision model.
    dtype = value_of(like).dtype
    return result if value_of(result).dtype == dtype else graph.call(aten.to.dtype, result, dtype, like=like)
