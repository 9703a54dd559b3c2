"""The pass ``fold-prompts``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.axes import axis_in_result
from optpass.analysis.operators import argument
from optpass.analysis.pieces import cat_dim, piece_of
from optpass.ir.graph import Graph, path_of, shape_of, value_of
from optpass.ir.program import Program
from optpass.ir.sizes import is_size
from optpass.ir.text import operator_name
from optpass.ir.weights import accumulation_dtype
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.constant_folding import fold_values
from optpass.rewrite.rules import apply_rules, replace
from optpass.rewrite.views import JoinedPieces

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
CONTINUE = "prompts continue through the layers (VPT-Shallow, or a class token)"


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
            prefixes: dict[Node, str] = {}
            for cat in graph.calls:
                if cat.target is aten.cat.default:
                    prefixes |= _fold_parts(graph, cat, context, entry)
            program = fold_values(program, entry, prefixes)
        if context.sites:
            apply_rules(program, (JoinedPieces(),))
        return program.pruned()


def _fold_parts(graph: Graph, cat: Node, context: Context, entry: str) -> dict[Node, str]:
    """Fold every part of ``cat`` that is prompts; the values that are to become weights, with their names."""
    prefixes: dict[Node, str] = {}
    parts: Any = cat.args[0]
    for part in parts:
        prompts = Prompts.of(cat, part)
        if prompts is None:
            continue
        layer = _Layer(graph, prompts)
        reason = layer.explore()
        if reason is None:
            for attention in layer.attentions:
                context.rewrote(attention, entry)
            cat, made = layer.rewrite()
            prefixes |= made
        elif reason:
            context.decline(part if part.op == "call_function" else cat, reason, entry)
        if cat.target is not aten.cat.default:
            break
    return prefixes


@dataclass(frozen=True)
class Prompts:
    """Rows ``[start:stop]`` along ``axis`` of ``cat``, and what they are without repetition over the batch."""

    cat: Node
    part: Node
    axis: int
    start: Any
    stop: Any
    rows: Node

    @staticmethod
    def of(cat: Node, part: Node) -> Prompts | None:
        """``part`` of ``cat``, unless it is not along a token axis, or stands in it twice."""
        parts: Any = cat.args[0]
        axis = cat_dim(cat)
        if axis >= len(shape_of(cat)) - 1 or parts.count(part) != 1:
            return None
        start: Any = 0
        for other in parts[: parts.index(part)]:
            start = start + shape_of(other)[axis]
        rows: Any = part
        while rows.target in (aten.expand.default, aten.repeat.default) and _repeats_others(rows, axis):
            rows = rows.args[0]
        return Prompts(cat, part, axis, start, start + shape_of(part)[axis], rows)

    @property
    def count(self) -> Any:
        return self.stop - self.start

    @property
    def repeated(self) -> tuple[int, ...]:
        """The dimensions of the cat that the rows are repeated over."""
        shape, sizes = self.single, shape_of(self.cat)
        return tuple(d for d, size in enumerate(sizes) if d != self.axis and shape[d] == 1 and size != 1)

    @property
    def single(self) -> tuple[Any, ...]:
        """The shape of the rows, with as many dimensions as the cat."""
        shape = shape_of(self.rows)
        return (1,) * (len(shape_of(self.cat)) - len(shape)) + shape

    @property
    def is_constant(self) -> bool:
        """Whether the rows depend on no input; sizes are none."""
        pending, seen = [self.rows], set()
        while pending:
            node = pending.pop()
            if node.op == "placeholder":
                return False
            if node not in seen and not is_size(node):
                seen.add(node)
                pending.extend(node.all_input_nodes)
        return True


def _repeats_others(node: Node, axis: int) -> bool:
    """Whether a repetition keeps the rows along ``axis``."""
    source: Any = node.args[0]
    shape, before = shape_of(node), shape_of(source)
    place = axis - (len(shape) - len(before))
    return place >= 0 and before[place] == shape[axis]


@dataclass
class _Layer:
    """What is computed from a cat with prompts, up to where their rows are dropped.

    ``axes`` has the token axis of every value with the prompts' rows among its own, ``mixed`` those of which the
    prompts' rows have seen the others, ``exits`` the slices and selections that leave the rows out.
    """

    graph: Graph
    prompts: Prompts
    axes: dict[Node, int] = field(default_factory=dict)
    mixed: set[Node] = field(default_factory=set)
    exits: list[Node] = field(default_factory=list)
    attentions: list[Node] = field(default_factory=list)

    def explore(self) -> str | None:
        """``None`` if the rows are prompts to fold, else why not; an empty reason where they are nothing like it."""
        self.axes[self.prompts.cat] = self.prompts.axis
        constant, reason = self.prompts.is_constant, None
        for node in self._readers():
            if (reason := self._visit(node)) is not None:
                break
        if not self.attentions:
            return ""
        if not constant:
            return self._input_reason(reason)
        return reason or self._prefix_doubt()

    def _readers(self) -> Iterator[Node]:
        """Every node that reads a value with the rows, in the graph's order; what is found on the way included."""
        node, waiting = self.prompts.cat.next, set(self.prompts.cat.users)
        while waiting:
            if node in waiting:
                waiting.discard(node)
                yield node
                if node in self.axes:
                    waiting |= set(node.users)
            node = node.next

    def _visit(self, node: Node) -> str | None:
        """Follow the rows through ``node``; why that is not possible."""
        if node.op == "output":
            return "the graph returns their rows"
        if node.target is ATTENTION:
            return self._visit_attention(node)
        if self._cuts_tokens(node):
            return self._visit_cut(node)
        axis = axis_in_result(node, self.axes)
        if axis is None:
            return (
                f"{path_of(node)}: %{node.name} = {operator_name(node)} reads their rows, "
                "and is not known to keep them from the others"
            )
        self.axes[node] = axis
        if any(operand in self.mixed for operand in node.all_input_nodes):
            self.mixed.add(node)
        return None

    def _visit_attention(self, node: Node) -> str | None:
        query, key, value = node.args[:3]
        if query not in self.axes and not self.attentions:
            return "their keys and values alone are read"
        self.attentions.append(node)
        operands = (query, key, value)
        if any(operand not in self.axes or self.axes[operand] != len(shape_of(operand)) - 2 for operand in operands):  # type: ignore[index, arg-type]
            return f"{path_of(node)}: the attention is not among the tokens of one sequence"
        if key in self.mixed or value in self.mixed:
            return CONTINUE
        if argument(node, "attn_mask") is not None:
            return f"{path_of(node)}: the attention has a mask (simplify drops one that hides nothing)"
        if argument(node, "is_causal") or argument(node, "dropout_p"):
            return f"{path_of(node)}: the attention is causal, or drops out at random"
        self.axes[node] = len(shape_of(node)) - 2
        self.mixed.add(node)
        return None

    def _cuts_tokens(self, node: Node) -> bool:
        source = node.args[0]
        if node.target not in (aten.slice.Tensor, aten.select.int) or not isinstance(source, Node):
            return False
        return int(argument(node, "dim")) % len(shape_of(source)) == self.axes[source]

    def _visit_cut(self, node: Node) -> str | None:
        bounds = self._cut(node)
        if bounds is None:
            return f"{path_of(node)}: which rows %{node.name} takes is not known"
        start, stop = bounds
        if not _is_before(stop, self.prompts.start) and not _is_before(self.prompts.stop, start):
            return f"{CONTINUE}: {path_of(node)}: %{node.name} reads their rows"
        self.exits.append(node)
        return None

    def _cut(self, node: Node) -> tuple[Any, Any] | None:
        """The rows that a slice or selection along the tokens takes."""
        if node.target is aten.slice.Tensor:
            piece = piece_of(node)
            return None if piece is None else (piece.start, piece.stop)
        source, index = node.args[0], argument(node, "index")
        if not isinstance(index, int):
            return None
        size = shape_of(source)[self.axes[source]]  # type: ignore[arg-type, index]
        first = index if index >= 0 else size + index
        return first, first + 1

    def _input_reason(self, reason: str | None) -> str:
        """Rows that depend on the input look like prompts where all else fits and the next layer's take their place."""
        next_layer = any(user.target is aten.cat.default for node in self.exits for user in node.users)
        fits = reason is None and next_layer
        return "the prompts depend on the input: their keys and values are no constants" if fits else ""

    def _prefix_doubt(self) -> str | None:
        """Why keys and values of the rows alone cannot be computed."""
        for attention in self.attentions:
            for node in self._above(attention.args[1]) | self._above(attention.args[2]):  # type: ignore[arg-type]
                if self._single_shape(node) is None:
                    return f"{path_of(node)}: %{node.name} merges the batch with another dimension"
        return None

    def _above(self, node: Node) -> set[Node]:
        """``node`` and what it is computed from, back to the cat."""
        found, pending = set(), [node]
        while pending:
            current = pending.pop()
            if current in self.axes and current not in found:
                found.add(current)
                pending.extend(current.all_input_nodes)
        return found

    def _single_shape(self, node: Node) -> list[Any] | None:
        """The shape of a reshape's result for the prompts' rows alone, once; of other values it does not matter."""
        if node.target is not aten.reshape.default:
            return []
        shape: list[Any] = list(shape_of(node))
        shape[self.axes[node]] = self.prompts.count
        for places in self._batch_axes:
            if node not in places:
                return None
            shape[places[node]] = 1
        return shape

    @property
    def _batch_axes(self) -> list[dict[Node, int]]:
        """For every dimension that the rows are repeated over, where it is in the values above the attention."""
        if not hasattr(self, "_batches"):
            self._batches = [self._followed(dim) for dim in self.prompts.repeated]
        return self._batches

    def _followed(self, dim: int) -> dict[Node, int]:
        places = {self.prompts.cat: dim}
        for node in self.axes:
            if node in places or node in self.mixed:
                continue
            place = axis_in_result(node, places)
            if place is not None:
                places[node] = place
        return places

    def rewrite(self) -> tuple[Node, dict[Node, str]]:
        """The layer without the prompts' rows; what takes the cat's place, and the keys and values of the prompts."""
        graph, prompts = self.graph, self.prompts
        parts: Any = prompts.cat.args[0]
        kept = [part for part in parts if part is not prompts.part]
        with graph.before(prompts.cat):
            short = kept[0] if len(kept) == 1 else graph.call(aten.cat.default, kept, prompts.axis, like=prompts.cat)
            rows: dict[Node, Node] = {prompts.cat: self._rows()}
        mapped = {prompts.cat: short}
        prefixes: dict[Node, str] = {}
        for node in list(self.axes)[1:]:
            with graph.before(node):
                if node.target is ATTENTION:
                    mapped[node] = self._attention(node, mapped, rows, prefixes)
                else:
                    mapped[node] = self._call(node, mapped, self._short_shape(node, mapped))
        for node in self.exits:
            with graph.before(node):
                replace(node, self._exit(node, mapped))
        return short, prefixes

    def _rows(self) -> Node:
        """The prompts without repetition, with the cat's dimensions, in the precision that weights are folded in."""
        graph, prompts = self.graph, self.prompts
        rows, shape = prompts.rows, list(prompts.single)
        if shape_of(rows) != tuple(shape):
            rows = graph.call(aten.reshape.default, rows, shape, like=prompts.part)
        return self._wide(rows, prompts.part)

    def _wide(self, node: Node, like: Node) -> Node:
        dtype = value_of(node).dtype
        wide = accumulation_dtype(dtype)
        return node if dtype == wide else self.graph.call(aten.to.dtype, node, wide, like=like)

    def _call(self, node: Node, mapped: dict[Node, Node], shape: list[Any] | None, *, wide: bool = False) -> Node:
        """``node``'s operator on other operands, reshaping to ``shape``; its weights widened where the rows are."""
        if node.target is aten.reshape.default:
            return self.graph.call(node.target, mapped[node.args[0]], shape, like=node)  # type: ignore[index]

        def operand(value: Node) -> Any:
            if value in mapped:
                return mapped[value]
            return self._wide(value, node) if wide and not is_size(value) else value

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), operand)
        return self.graph.call(node.target, *args, like=node, **kwargs)

    def _short_shape(self, node: Node, mapped: dict[Node, Node]) -> list[Any] | None:
        if node.target is not aten.reshape.default:
            return None
        source: Any = node.args[0]
        shape: list[Any] = list(shape_of(node))
        shape[self.axes[node]] = shape_of(mapped[source])[self.axes[source]]
        return shape

    def _attention(
        self, node: Node, mapped: dict[Node, Node], rows: dict[Node, Node], prefixes: dict[Node, str]
    ) -> Node:
        """The attention of the other tokens over their keys and values with the prompts' in front."""
        operands = [mapped[node.args[0]]]  # type: ignore[index]
        for index, leaf in ((1, "prompt_key"), (2, "prompt_value")):
            whole: Any = node.args[index]
            prefix = self._row_values(whole, rows, node)
            if prefix.op == "call_function":
                prefixes[prefix] = leaf
            rest = mapped[whole]
            repeated: list[Any] = list(shape_of(rest))
            repeated[-2] = self.prompts.count
            if value_of(prefix).dtype != value_of(rest).dtype:
                prefix = self.graph.call(aten.to.dtype, prefix, value_of(rest).dtype, like=node)
            if list(shape_of(prefix)) != repeated:
                prefix = self.graph.call(aten.expand.default, prefix, repeated, like=node)
            operands.append(self.graph.call(aten.cat.default, [prefix, rest], -2, like=node))
        return self.graph.call(node.target, *operands, *node.args[3:], like=node, **node.kwargs)

    def _row_values(self, whole: Node, rows: dict[Node, Node], attention: Node) -> Node:
        """``whole``, for the prompts' rows alone; a value of its own, which a weight can take the place of."""
        for node in sorted(self._above(whole) - rows.keys(), key=list(self.axes).index):
            rows[node] = self._call(node, rows, self._single_shape(node), wide=True)
        return rows[whole]

    def _exit(self, node: Node, mapped: dict[Node, Node]) -> Node:
        """A slice or selection of the other rows, from where they are now."""
        bounds = self._cut(node)
        assert bounds is not None
        start, stop = bounds
        if _is_before(self.prompts.stop, start):
            start, stop = start - self.prompts.count, stop - self.prompts.count
        source: Any = node.args[0]
        axis = self.axes[source]
        if node.target is aten.select.int:
            return self.graph.call(node.target, mapped[source], axis, start, like=node)
        return self.graph.call(node.target, mapped[source], axis, start, stop, like=node)


def _is_before(first: Any, second: Any) -> bool:
    """Whether one place is certainly not behind another; open sizes are at least zero."""
    gap = second - first
    if isinstance(gap, int):
        return gap >= 0
    return bool(gap.is_nonnegative)
