"""A block of which only some tokens take part; the others pass it by unchanged, and all are back in place behind it.

The authors' token selector, which predicts the next layer's attention from this layer's, is not published. This one is
small and reads what every token receives in each head, a = N · mean over queries:

    u = FC₂(GELU(FC₁(a)))        score = mean over heads of a, plus u        x ← x + 2σ(u) · (block(x) − x)

FC₁ makes 4·h values of h heads and FC₂ one. FC₂ begins at zero: what a token received is the prediction of what it will
receive, and the factor is 1. The factor is what leads a gradient to the selector, as in mixture-of-depths (Raposo et
al., arXiv 2404.02258): a choice of the highest scores has none.

Source: ToSA, Singh et al., CVPRW 2024, arXiv 2406.08816.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch.fx import Node

from optpass.analysis.attention import Attention
from optpass.analysis.blocks import Block
from optpass.analysis.operators import aten
from optpass.analysis.token_flow import TokenFlow, token_flow
from optpass.ir.graph import PATH, Graph, shape_of, value_of
from optpass.ir.weights import Constant, Expression
from optpass.rewrite.attention_received import attention_map, received, received_by_head, unreadable
from optpass.rewrite.reused_attention import uniform
from optpass.rewrite.token_counts import with_count
from optpass.rewrite.token_rows import RowWriter

HIDDEN = 4


@dataclass(frozen=True)
class Prediction:
    """How much the next layer will want each token [batch, tokens]; the factor of what it adds [batch, tokens, 1]."""

    scores: Node
    gate: Node | None = None


@dataclass
class SelectorWriter:
    """Writes the selector at the insertion point; its weights are called ``path``.fc1.weight and so on.

    ``weights`` are those that exist already, of another entry of the Program, and those that are made.
    """

    graph: Graph
    path: str
    seed: int
    weights: dict[str, Expression] = field(default_factory=dict)

    def predicted(self, weights: Node, like: Node) -> Prediction:
        """From the map ``weights`` [batch, heads, queries, keys]; results have the dtype of ``like``."""
        found = received_by_head(self.graph, weights, like)
        heads = int(shape_of(found)[-1])
        hidden = self._call("act", aten.gelu.default, self._linear("fc1", found, HIDDEN * heads))
        change = self._linear("fc2", hidden, 1)
        mean = self._call("score", aten.mean.dim, found, [-1], True)
        score = self._call("score", aten.squeeze.dim, self._call("score", aten.add.Tensor, mean, change), -1)
        gate = self._call("gate", aten.sigmoid.default, change)
        return Prediction(score, self._call("gate", aten.mul.Tensor, gate, 2.0))

    def _call(self, name: str, operator: object, *args: object) -> Node:
        node = self.graph.call(operator, *args, like=args[0])  # type: ignore[arg-type]
        node.meta = {"val": node.meta["val"], PATH: f"{self.path}.{name}"}
        return node

    def _linear(self, name: str, value: Node, width: int) -> Node:
        weight = self._weight(f"{name}.weight", value, (width, int(shape_of(value)[-1])))
        return self._call(name, aten.linear.default, value, weight, self._weight(f"{name}.bias", value, (width,)))

    def _weight(self, name: str, like: Node, shape: tuple[int, ...]) -> Node:
        full = f"{self.path}.{name}"
        if full not in self.weights:
            made = torch.zeros(shape) if name.startswith("fc2") else uniform(full, shape, self.seed)
            self.weights[full] = Constant(made.to(value_of(like).dtype))
        return self.graph.weight(full, self.weights[full], like=like)


@dataclass(frozen=True)
class Taking:
    """The tokens that take part in a block: ``rows`` [batch, k, d], their places ``index`` [batch, k], ``gate``."""

    rows: Node
    index: Node
    gate: Node | None


def taking_part(graph: Graph, rows: Node, prediction: Prediction, count: int, protected: int) -> Taking:
    """``count`` of ``rows`` [batch, tokens, d], at the insertion point: the first ``protected``, the highest scores."""
    write = RowWriter(graph, rows)
    batch = shape_of(rows)[0]
    index = write.item(write.call(aten.topk.default, write.sliced(prediction.scores, protected), count - protected), 1)
    if protected:
        first = write.call(aten.expand.default, write.call(aten.arange.default, protected), [batch, protected])
        index = write.joined([first, write.call(aten.add.Tensor, index, protected)])
    gate = None if prediction.gate is None else write.taken(prediction.gate, index)
    return Taking(write.taken(rows, index), index, gate)


def back_in_place(graph: Graph, stream: Node, taking: Taking, result: Node) -> Node:
    """``stream`` [batch, tokens, d] at the insertion point, with ``result`` [batch, k, d] where tokens took part."""
    write = RowWriter(graph, result)
    if taking.gate is not None:
        added = write.call(aten.sub.Tensor, result, taking.rows)
        result = write.call(aten.add.Tensor, taking.rows, write.call(aten.mul.Tensor, taking.gate, added))
    return write.put_back(stream, taking.index, result)


@dataclass(frozen=True)
class Bypass:
    """A block from ``entering`` to ``leaving``, whose ``nodes`` are in order, and the attention ``prior`` to it.

    ``kept`` tokens take part, the first ``protected`` among them.
    """

    entering: Node
    leaving: Node
    nodes: tuple[Node, ...]
    prior: Attention
    flow: TokenFlow
    protected: int
    kept: int = 0

    @classmethod
    def of(cls, block: Block, prior: Attention, within: Sequence[Attention], protected: int) -> Bypass | str:
        """The block with the attentions ``within``, or why all tokens have to take part in it."""
        if len(block.entering) != 1:
            return "its block has several streams"
        [entering], [leaving] = block.entering, block.leaving
        if reason := unreadable(prior, shape_of(entering)[0]):
            return f"the layer before: {reason}"
        if any(residual.carrier is not residual.stream for residual in block.residuals):
            return "its stream is changed on the way through the block"
        nodes = sorted({node for each in block.residuals for node in (*each.all_nodes, each.add)})
        inside = set(nodes)
        for node in nodes:
            if node is not leaving and not inside.issuperset(node.users):
                return f"%{node.name} in its block is read outside of it"
        flow = token_flow(nodes, {entering: 1}, [each.core for each in within], protected)
        if flow.obstacles:
            return f"%{flow.obstacles[0].node.name} in its block {flow.obstacles[0].reason}"
        if flow.means:
            return f"%{next(iter(flow.means)).name} in its block is a mean over all tokens"
        return cls(entering, leaving, tuple(nodes), prior, flow, protected)

    def keeping(self, kept: int) -> Bypass:
        return replace(self, kept=kept)


@dataclass
class BypassedTokens:
    """Writes bypasses into ``graph``; ``weights`` are those of selectors, which all entries share."""

    graph: Graph
    surrogate: Literal["selector", "column-mean"]
    seed: int
    weights: dict[str, Expression]

    def write(self, site: Bypass, path: str) -> None:
        """Let all but some tokens pass by; a selector's weights are called ``path``.fc1.weight and so on."""
        first = next(node for node in site.nodes if site.entering in node.all_input_nodes)
        weights = attention_map(self.graph, site.prior.core)
        with self.graph.before(first):
            if self.surrogate == "selector":
                writer = SelectorWriter(self.graph, path, self.seed, self.weights)
                prediction = writer.predicted(weights, site.entering)
            else:
                prediction = Prediction(received(self.graph, weights, site.entering))
            taking = taking_part(self.graph, site.entering, prediction, site.kept, site.protected)
        inside = set(site.nodes)
        site.entering.replace_all_uses_with(taking.rows, delete_user_cb=lambda user: user in inside)
        for node in site.nodes:
            if node in site.flow.rows:
                with_count(self.graph, node, site.flow, {1: site.kept})
        self._close(site, taking)

    def _close(self, site: Bypass, taking: Taking) -> None:
        following, users = site.leaving.next, set(site.leaving.users)
        with self.graph.before(following):
            result = back_in_place(self.graph, site.entering, taking, site.leaving)
        site.leaving.replace_all_uses_with(result, delete_user_cb=lambda user: user in users)
