"""The pass ``fold-prompts``."""

from __future__ import annotations

from typing import Any

from torch.fx import Node, map_arg

from optpass.analysis.followed_axis import axis_in_result
from optpass.analysis.inserted_rows import ATTENTION, InsertedRows, RowsLayer, is_before
from optpass.analysis.operators import aten
from optpass.ir.graph import Graph, path_of, shape_of, value_of
from optpass.ir.program import Program
from optpass.ir.sizes import is_size
from optpass.ir.weights import accumulation_dtype
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.constant_folding import fold_values
from optpass.rewrite.rules import apply_rules, replace
from optpass.rewrite.views import JoinedPieces


class FoldPrompts(Pass):
    """[cls, prompts, patches] → layer → [cls, patches], prompts dropped, becomes a layer on [cls, patches] alone.

    Learned prompt tokens that a layer puts between its tokens, and whose rows nobody reads afterwards (the next
    layer puts others in their place), act through their keys and values only, and these are constants:
    K_p, V_p = W_{k,v}·LN(P). They become weights, computed lazily, in front of the keys and values; the prompts'
    queries and their way through the MLP are gone. Of the cost of n prompts, n·(12d² + …) MACs a layer, the
    attention's 2·N·n·d remains. Separate projections and fused ones, heads by reshape and transposition, any
    number of prompts, open sizes.

    Leaves alone, with the reason: prompts that continue through the layers (VPT-Shallow; a class token looks the
    same), prompts that depend on the input, attention with a mask, a causal flag or dropout, written-out
    attention, prompts whose rows are mixed with others (a mean over all tokens). In half precision K_p and V_p are
    computed and stored in float32 and rounded once, where they are read.

    Source: Jia et al., Visual Prompt Tuning, arXiv 2203.12119, section 3.2 (VPT-Deep); the fold is derived.
    """

    contract = exact(rtol=1e-5)

    def run(self, program: Program, context: Context) -> Program:
        for entry, graph in program.entries.items():
            made: dict[Node, str] = {}
            for cat in graph.calls:
                if cat.target is aten.cat.default:
                    made |= _fold_parts(graph, cat, context, entry)
            program = fold_values(program, entry, made)
        if context.sites:
            apply_rules(program, (JoinedPieces(),))
        return program.pruned()


def _fold_parts(graph: Graph, cat: Node, context: Context, entry: str) -> dict[Node, str]:
    """Fold every part of ``cat`` that is prompts; the values that are to become weights, with their leaf names."""
    made: dict[Node, str] = {}
    parts: Any = cat.args[0]
    for part in parts:
        inserted = InsertedRows.of(cat, part)
        if inserted is None:
            continue
        layer = RowsLayer(inserted)
        reason = layer.explore()
        prompts = _Prompts(graph, layer)
        if reason is None:
            reason = prompts.doubt()
        if reason:
            context.decline(part if part.op == "call_function" else cat, reason, entry)
        if reason is not None:
            continue
        for attention in layer.attentions:
            context.rewrote(attention, entry)
        cat = _Shortened(graph, layer, prompts).run()
        made |= prompts.made
        if cat.target is not aten.cat.default:
            break
    return made


class _Prompts:
    """Keys and values of the prompts' rows alone, once for the whole batch; ``made`` are those to become weights."""

    def __init__(self, graph: Graph, layer: RowsLayer) -> None:
        self.graph, self.layer, self.inserted = graph, layer, layer.inserted
        self.made: dict[Node, str] = {}
        self.values: dict[Node, Node] = {}
        self.batch = [self._followed(dim) for dim in self.inserted.repeated]

    def doubt(self) -> str | None:
        """Why they cannot be computed."""
        for attention in self.layer.attentions:
            for node in (*self.layer.above(attention.args[1]), *self.layer.above(attention.args[2])):
                if any(node not in places for places in self.batch):
                    varied = any(o not in self.layer.axes and o.op != "get_attr" for o in node.all_input_nodes)
                    what = "takes what differs along the batch" if varied else "merges the batch with another dimension"
                    return f"{path_of(node)}: %{node.name} {what}"
        return None

    def begin(self) -> None:
        """Insert the rows with the cat's dimensions, in the precision that weights are folded in."""
        rows, shape = self.inserted.rows, list(self.inserted.single)
        if shape_of(rows) != tuple(shape):
            rows = self.graph.call(aten.reshape.default, rows, shape, like=self.inserted.part)
        self.values[self.inserted.cat] = self._wide(rows, self.inserted.part)

    def prefix(self, whole: Node, rest: Node, leaf: str, like: Node) -> Node:
        """``whole`` for the prompts' rows, repeated to the batch of ``rest``; a weight called ``leaf`` is under it."""
        for node in self.layer.above(whole):
            if node not in self.values:
                self.values[node] = self._call(node)
        value = self.values[whole]
        if value.op == "call_function":
            self.made[value] = leaf
        if value_of(value).dtype != value_of(rest).dtype:
            value = self.graph.call(aten.to.dtype, value, value_of(rest).dtype, like=like)
        sizes: list[Any] = list(shape_of(rest))
        sizes[-2] = self.inserted.count
        if list(shape_of(value)) != sizes:
            value = self.graph.call(aten.expand.default, value, sizes, like=like)
        return value

    def _call(self, node: Node) -> Node:
        """A node's operator on the rows' values, and on wide weights."""
        if node.target is aten.reshape.default:
            shape: list[Any] = list(shape_of(node))
            shape[self.layer.axes[node]] = self.inserted.count
            for places in self.batch:
                shape[places[node]] = 1
            return self.graph.call(node.target, self.values[node.args[0]], shape, like=node)  # type: ignore[index]

        def operand(value: Node) -> Node:
            if value in self.values:
                return self.values[value]
            return value if is_size(value) else self._wide(value, node)

        args, kwargs = map_arg((node.args, node.kwargs), operand)
        return self.graph.call(node.target, *args, like=node, **kwargs)

    def _wide(self, node: Node, like: Node) -> Node:
        dtype = value_of(node).dtype
        wide = accumulation_dtype(dtype)
        return node if dtype == wide else self.graph.call(aten.to.dtype, node, wide, like=like)

    def _followed(self, dim: int) -> dict[Node, int]:
        """Where a dimension that the rows are repeated over is in the values in front of the attention."""
        places = {self.inserted.cat: dim}
        for node in self.layer.axes:
            place = None if node in places or node in self.layer.mixed else axis_in_result(node, places)
            if place is not None:
                places[node] = place
        return places


class _Shortened:
    """The layer without the prompts' rows, their keys and values in front of the others'."""

    def __init__(self, graph: Graph, layer: RowsLayer, prompts: _Prompts) -> None:
        self.graph, self.layer, self.prompts = graph, layer, prompts
        self.mapped: dict[Node, Node] = {}

    def run(self) -> Node:
        """Rewrite; what takes the cat's place, which is no cat where one part remains."""
        inserted, graph = self.layer.inserted, self.graph
        parts: Any = inserted.cat.args[0]
        kept = [part for part in parts if part is not inserted.part]
        with graph.before(inserted.cat):
            joined = len(kept) > 1
            short = graph.call(aten.cat.default, kept, inserted.axis, like=inserted.cat) if joined else kept[0]
            self.prompts.begin()
        self.mapped[inserted.cat] = short
        for node in list(self.layer.axes)[1:]:
            with graph.before(node):
                self.mapped[node] = self._attention(node) if node.target is ATTENTION else self._call(node)
        for node in self.layer.exits:
            with graph.before(node):
                replace(node, self._exit(node))
        return short

    def _call(self, node: Node) -> Node:
        source: Any = node.args[0]
        if node.target is aten.reshape.default:
            shape: list[Any] = list(shape_of(node))
            shape[self.layer.axes[node]] = shape_of(self.mapped[source])[self.layer.axes[source]]
            return self.graph.call(node.target, self.mapped[source], shape, like=node)
        args, kwargs = map_arg((node.args, node.kwargs), lambda value: self.mapped.get(value, value))
        return self.graph.call(node.target, *args, like=node, **kwargs)

    def _attention(self, node: Node) -> Node:
        operands: Any = node.args[:3]
        query, *pair = (self.mapped[operand] for operand in operands)
        joined = []
        for whole, rest, leaf in zip(operands[1:], pair, ("prompt_key", "prompt_value"), strict=True):
            prefix = self.prompts.prefix(whole, rest, leaf, node)
            joined.append(self.graph.call(aten.cat.default, [prefix, rest], -2, like=node))
        return self.graph.call(node.target, query, *joined, *node.args[3:], like=node, **node.kwargs)

    def _exit(self, node: Node) -> Node:
        """A slice or selection of the other rows, from where they are now."""
        inserted, bounds = self.layer.inserted, self.layer.cut(node)
        assert bounds is not None
        start, stop = bounds
        if is_before(inserted.stop, start):
            start, stop = start - inserted.count, stop - inserted.count
        source: Any = node.args[0]
        rows = (start,) if node.target is aten.select.int else (start, stop)
        return self.graph.call(node.target, self.mapped[source], self.layer.axes[source], *rows, like=node)
