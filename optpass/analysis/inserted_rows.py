"""Rows that a cat puts between a sequence's tokens and that nobody reads after the attention: prompts, registers.

What they do there they do through their keys and values. Whoever knows those can leave the rows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from optpass.analysis.followed_axis import axis_in_result
from optpass.analysis.operators import argument, aten
from optpass.analysis.pieces import cat_dim, extent, piece_of
from optpass.ir.graph import path_of, shape_of
from optpass.ir.sizes import is_size
from optpass.ir.text import operator_name

ATTENTION = aten.scaled_dot_product_attention.default
CONTINUE = "prompts continue through the layers (VPT-Shallow, or a class token)"
REPETITIONS = (aten.expand.default, aten.repeat.default)


@dataclass(frozen=True)
class InsertedRows:
    """``part`` of ``cat``: rows ``[start:stop]`` along ``axis``; ``rows`` is it without repetition over the batch."""

    cat: Node
    part: Node
    axis: int
    start: Any
    stop: Any
    rows: Node

    @staticmethod
    def of(cat: Node, part: Node) -> InsertedRows | None:
        """``None`` where the cat joins features, or ``part`` stands in it twice."""
        parts: Any = cat.args[0]
        axis = cat_dim(cat)
        if axis >= len(shape_of(cat)) - 1 or parts.count(part) != 1:
            return None
        start: Any = 0
        for other in parts[: parts.index(part)]:
            start = start + extent(other, axis)
        rows: Any = part
        while rows.target in REPETITIONS and _keeps_rows(rows, axis):
            rows = rows.args[0]
        return InsertedRows(cat, part, axis, start, start + extent(part, axis), rows)

    @property
    def count(self) -> Any:
        return self.stop - self.start

    @property
    def single(self) -> tuple[Any, ...]:
        """The shape of ``rows``, with as many dimensions as the cat."""
        shape = shape_of(self.rows)
        return (1,) * (len(shape_of(self.cat)) - len(shape)) + shape

    @property
    def repeated(self) -> tuple[int, ...]:
        """The dimensions of the cat that the rows are repeated over."""
        single = self.single
        return tuple(
            dim for dim, size in enumerate(shape_of(self.cat)) if dim != self.axis and single[dim] == 1 and size != 1
        )

    @property
    def is_constant(self) -> bool:
        """Whether the rows depend on no input; sizes are none."""
        pending: list[Node] = [self.rows]
        seen: set[Node] = set()
        while pending:
            node = pending.pop()
            if node.op == "placeholder":
                return False
            if node not in seen and not is_size(node):
                seen.add(node)
                pending.extend(node.all_input_nodes)
        return True


def _keeps_rows(repetition: Node, axis: int) -> bool:
    """Whether a repetition leaves the rows along ``axis`` as many as they are."""
    source: Any = repetition.args[0]
    after, before = shape_of(repetition), shape_of(source)
    place = axis - (len(after) - len(before))
    return place >= 0 and before[place] == after[axis]


@dataclass
class RowsLayer:
    """What is computed from a cat with inserted rows, up to where they are dropped.

    ``axes`` has the token axis of every value with the rows among its own, in the graph's order, the cat first;
    ``mixed`` those of which the rows have seen the others; ``exits`` the slices and selections that leave them out.
    """

    inserted: InsertedRows
    axes: dict[Node, int] = field(default_factory=dict)
    mixed: set[Node] = field(default_factory=set)
    exits: list[Node] = field(default_factory=list)
    attentions: list[Node] = field(default_factory=list)

    def explore(self) -> str | None:
        """``None`` if the rows act as constant keys and values alone, else why not; "" if they are nothing like it."""
        self.axes[self.inserted.cat] = self.inserted.axis
        reason = None
        for node in self._readers():
            if (reason := self._visit(node)) is not None:
                break
        if not self.attentions:
            return ""
        return reason if self.inserted.is_constant else self._input_reason(reason)

    def cut(self, node: Node) -> tuple[Any, Any] | None:
        """The rows, from and to, that a slice or selection along the tokens takes; ``None`` if that is not known."""
        if node.target is aten.slice.Tensor:
            piece = piece_of(node)
            return None if piece is None else (piece.start, piece.stop)
        source: Any = node.args[0]
        index = argument(node, "index")
        if not isinstance(index, int):
            return None
        first = index if index >= 0 else shape_of(source)[self.axes[source]] + index
        return first, first + 1

    def above(self, node: Any) -> list[Node]:
        """``node`` and what it is computed from, back to the cat and without it, in the graph's order."""
        found: set[Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current in self.axes and current not in found and current is not self.inserted.cat:
                found.add(current)
                pending.extend(current.all_input_nodes)
        return sorted(found)

    def _readers(self) -> Iterator[Node]:
        """Every node that reads a value with the rows, in the graph's order, what is found on the way included."""
        node, waiting = self.inserted.cat.next, set(self.inserted.cat.users)
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
            return f"{path_of(node)}: {operator_name(node)} (%{node.name}) may mix their rows with others"
        self.axes[node] = axis
        if any(operand in self.mixed for operand in node.all_input_nodes):
            self.mixed.add(node)
        return None

    def _visit_attention(self, node: Node) -> str | None:
        operands: Any = node.args[:3]
        query, key, value = operands
        if query not in self.axes and not self.attentions:
            return "their keys and values alone are read"
        self.attentions.append(node)
        if any(operand not in self.axes or self.axes[operand] != len(shape_of(operand)) - 2 for operand in operands):
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
        source: Any = node.args[0]
        if node.target not in (aten.slice.Tensor, aten.select.int) or source not in self.axes:
            return False
        return int(argument(node, "dim")) % len(shape_of(source)) == self.axes[source]

    def _visit_cut(self, node: Node) -> str | None:
        bounds = self.cut(node)
        if bounds is None:
            return f"{path_of(node)}: which rows %{node.name} takes is not known"
        start, stop = bounds
        if not is_before(stop, self.inserted.start) and not is_before(self.inserted.stop, start):
            return f"{CONTINUE}: {path_of(node)}: %{node.name} reads their rows"
        self.exits.append(node)
        return None

    def _input_reason(self, reason: str | None) -> str:
        """Rows that depend on the input look like prompts where all else fits and the next layer's take their place."""
        replaced = any(user.target is aten.cat.default for node in self.exits for user in node.users)
        fits = reason is None and replaced
        return "the prompts depend on the input: their keys and values are no constants" if fits else ""


def is_before(first: Any, second: Any) -> bool:
    """Whether one place along an axis is certainly not behind another, whatever the open sizes are."""
    gap = second - first
    return gap >= 0 if isinstance(gap, int) else bool(gap.is_nonnegative)
