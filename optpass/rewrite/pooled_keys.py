"""Keys and values of an attention in the means of windows of their grid, each counted as often as it stands for.

    softmax(q·kᵀ + log wₖ)·v,        wₖ = window² of a mean, 1 of a key by itself

Where all keys and values of a window are the same, this is the attention itself: window² equal terms of the softmax
are one, window² times as large.

Source: EfficientTAM, Xiong et al., arXiv 2411.18933, section 3, the form that has the constant in the logits. The
released form for fused attention adds it to every element of a pooled key, which is another function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optpass.analysis.attention_cores import Core, Operand
from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY, SOFTMAX, argument, aten, is_view
from optpass.analysis.permutations import permutation_of
from optpass.ir.graph import Graph, shape_of, value_of

MULTIPLIED = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default})
MASK = 3
"""The place of ``attn_mask`` among the arguments of a fused attention."""
CARRIED = MULTIPLIED | SOFTMAX | {aten.unsqueeze.default} | POINTWISE_UNARY | POINTWISE_BINARY
"""What may stand in an attention that is written out: whatever has no number of keys among its arguments."""


@dataclass(frozen=True)
class Segment:
    """Consecutive keys: a grid of ``rows`` × ``width``, the rows of all frames in order; or ``size`` others."""

    size: Any
    rows: Any = None
    width: Any = None

    def pooled_size(self, window: int) -> Any:
        """What is left of them."""
        return self.size if self.rows is None else (self.rows // window) * (self.width // window)


def unpoolable(core: Core) -> str:
    """Why the keys of ``core`` cannot be pooled, whatever they are; empty when they can."""
    if core.is_causal:
        return "it is causal: a window has keys that a query may see, and others"
    if core.query.node in (core.key.node, core.value.node):
        return "its queries are its keys or its values"
    if _is_mean(core.key.node):
        return "its keys are means already"
    if core.masks:
        return "it has a mask or a bias for every key (simplify drops a mask that hides nothing)"
    if core.softmax is None and core.nodes[0].target is not aten.scaled_dot_product_attention.default:
        return "it is a kernel that takes no bias"
    return _stuck(core) if core.softmax is not None else ""


def _stuck(core: Core) -> str:
    """What says how many keys an attention has that is written out, if anything does."""
    inside = set(core.nodes)
    for node in core.nodes:
        if node.target not in CARRIED and permutation_of(node) is None:
            return f"it is written out, and %{node.name} says how many keys there are"
        others = [operand for operand in node.all_input_nodes if operand not in inside]
        if node.target in POINTWISE_BINARY and any(set(shape_of(other)[-2:]) - {1} for other in others):
            return f"it is written out, and %{node.name} has a value for every key"
        if node is not core.nodes[-1] and not inside.issuperset(node.users):
            return f"%{node.name} is read by more than the attention"
    return ""


def pool_keys(graph: Graph, core: Core, segments: Sequence[Segment], window: int) -> None:
    """Pool keys and values of ``core``, whose keys are ``segments``, in windows of ``window`` × ``window``."""
    first, last = core.nodes[0], core.nodes[-1]
    with graph.before(first):
        keys = _pooled(graph, core.key, segments, window, first)
    first.replace_input_with(core.key.node, keys)
    with graph.before(last):
        values = _pooled(graph, core.value, segments, window, last)
    last.replace_input_with(core.value.node, values)
    if any(segment.rows is None for segment in segments):
        _add(graph, core, segments, window)
    graph.propagate(core.nodes)


def _add(graph: Graph, core: Core, segments: Sequence[Segment], window: int) -> None:
    """Add the logarithms of how many keys each one stands for to the logits."""
    softmax, fused = core.softmax, core.nodes[0]
    if softmax is None:
        with graph.before(fused):
            counted = _counted(graph, fused, segments, window)
        if len(fused.args) > MASK:
            fused.update_arg(MASK, counted)
        else:
            fused.update_kwarg("attn_mask", counted)
        return
    scores: Any = softmax.args[0]
    graph.propagate(core.nodes[: core.nodes.index(softmax)])
    behind = len(shape_of(scores)) - 1 - int(argument(softmax, "dim")) % len(shape_of(scores))
    with graph.before(softmax):
        counted = _counted(graph, softmax, segments, window)
        if behind:
            counted = graph.call(aten.reshape.default, counted, [-1, *[1] * behind], like=softmax)
        biased = graph.call(aten.add.Tensor, scores, counted, like=softmax)
    softmax.replace_input_with(scores, biased)


def _pooled(graph: Graph, operand: Operand, segments: Sequence[Segment], window: int, like: Node) -> Node:
    parts, start = [], 0
    for segment in segments:
        part = operand.node
        if len(segments) > 1:
            stop = start + segment.size
            part = graph.call(aten.slice.Tensor, part, operand.tokens, start, stop, like=like)
            start = stop
        parts.append(part if segment.rows is None else _means(graph, part, operand.tokens, segment, window, like))
    return parts[0] if len(parts) == 1 else graph.call(aten.cat.default, parts, operand.tokens, like=like)


def _means(graph: Graph, part: Node, dim: int, segment: Segment, window: int, like: Node) -> Node:
    """Over windows, what stands before and behind the tokens being two dimensions: engines take few."""
    shape = shape_of(part)
    before, behind = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    rows, columns = segment.rows // window, segment.width // window
    split = graph.call(aten.reshape.default, part, [before * rows, window, columns, window, behind], like=like)
    means = graph.call(aten.mean.dim, split, [1, 3], like=like)
    return graph.call(aten.reshape.default, means, [*shape[:dim], rows * columns, *shape[dim + 1 :]], like=like)


def _counted(graph: Graph, like: Node, segments: Sequence[Segment], window: int) -> Node:
    """The logarithms [1, keys] of how many keys each one stands for."""
    dtype = value_of(like).dtype
    parts = [
        graph.call(
            aten.full.default,
            [1, segment.pooled_size(window)],
            0.0 if segment.rows is None else 2 * math.log(window),
            like=like,
            dtype=dtype,
        )
        for segment in segments
    ]
    return graph.call(aten.cat.default, parts, 1, like=like)


def _is_mean(node: Node) -> bool:
    """Whether means of its own kind are what ``node`` is made of, past views."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if node.target is aten.mean.dim:
            return True
        if is_view(node) or node.target is aten.cat.default:
            fresh = [operand for operand in node.all_input_nodes if operand not in seen]
            seen.update(fresh)
            pending += fresh
    return False
