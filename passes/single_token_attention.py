"""The pass ``single-token-attention``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.operators import argument
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.broadcast import expands_above, sink_expand
from optpass.rewrite.pattern import Match
from optpass.rewrite.rules import Rule, apply_rules

aten = torch.ops.aten


class SingleTokenAttention(Pass):
    """softmax(q·kᵀ)·v with one key token → v, repeated over the queries.

    A softmax over one element is 1, so the attention returns its single value row for every query:
    ``to_out(to_v(context))``. The repetition sinks below ``to_out`` into the residual addition, which
    broadcasts, and so does one that stood above ``to_v`` already (SVD repeats the context over all pixels
    for its temporal attention): both linears work on one row. ``to_q``, ``to_k`` and the norm in front of
    them are dead and go with their parameters. Both the fused operator and the written-out product–softmax–product
    are taken. SVD has 32 such places: every cross-attention, spatial and temporal, sees one CLIP token.

    Leaves alone: attention over more than one key, which is not reported; and, with the reason and the
    module path, attention over one key that has a mask, a causal flag, dropout, or grouped heads.
    Where q·kᵀ is infinite or NaN the original returns NaN and the result does not.

    Source: MobileVD, arXiv 2412.07583, section "optimized cross-attention"; there trained weights are
    kept as they are, and so are they here.
    """

    contract = exact(rtol=1e-5)

    def run(self, program: Program, context: Context) -> Program:
        rules = (FusedAttention(), WrittenAttention())
        apply_rules(program, rules, context)
        made = [pair for rule in rules for pair in rule.made]
        above = [(graph, found) for graph, expand in made for found in expands_above(expand)]
        for graph, expand in above:
            sink_expand(graph, expand)
        return program.pruned()


class RepeatValue(Rule):
    """Puts the value row, repeated over the queries, in place of an attention; remembers each repetition."""

    def __init__(self) -> None:
        self.made: list[tuple[Graph, Node]] = []

    def rewrite(self, graph: Graph, match: Match) -> Node:
        value: Node = match["value"]
        if shape_of(value) == shape_of(match.root):
            return value
        expand = graph.call(aten.expand.default, value, list(shape_of(match.root)), like=match.root)
        self.made.append((graph, expand))
        return expand


class FusedAttention(RepeatValue):
    """``scaled_dot_product_attention`` with one key."""

    def pattern(
        self, query: Any, key: Any, value: Any, mask: Any, dropout: Any, causal: Any, scale: Any, gqa: Any
    ) -> Any:
        return aten.scaled_dot_product_attention.default(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=gqa
        )

    def concerns(self, match: Match) -> bool:
        return shape_of(match["key"])[-2] == 1

    def check(self, match: Match) -> str | None:
        if match["mask"] is not None:
            return "the attention has a mask, which may hide the only key"
        if match["causal"]:
            return "the attention is causal: which queries see the only key depends on the alignment"
        if match["dropout"]:
            return "the attention drops out at random"
        if match["gqa"]:
            return "the heads share keys in groups (enable_gqa)"
        return None


class WrittenAttention(RepeatValue):
    """``softmax(scores) @ value`` with one key, the products as ``bmm`` or ``matmul``, a cast between them or not."""

    def pattern(self, scores: Any, dim: Any, dtype: Any, value: Any) -> Any:
        return aten.bmm.default(aten.softmax.int(scores, dim, dtype), value)

    def patterns(self) -> Sequence[Callable[..., Any]]:
        return (self.pattern, _matmul, _bmm_of_cast, _matmul_of_cast)

    def concerns(self, match: Match) -> bool:
        shape = shape_of(match["scores"])
        along_keys = match["dim"] % len(shape) == len(shape) - 1
        return along_keys and shape[-1] == 1 and len(shape_of(match["value"])) > 1

    def check(self, match: Match) -> str | None:
        return _doubt(match["scores"])


def _matmul(scores: Any, dim: Any, dtype: Any, value: Any) -> Any:
    return aten.matmul.default(aten.softmax.int(scores, dim, dtype), value)


def _bmm_of_cast(scores: Any, dim: Any, dtype: Any, value: Any, cast: Any) -> Any:
    return aten.bmm.default(aten.to.dtype(aten.softmax.int(scores, dim, dtype), cast), value)


def _matmul_of_cast(scores: Any, dim: Any, dtype: Any, value: Any, cast: Any) -> Any:
    return aten.matmul.default(aten.to.dtype(aten.softmax.int(scores, dim, dtype), cast), value)


SCALING = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.to.dtype, aten.reshape.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)


def _doubt(scores: Any) -> str | None:
    """Why ``scores`` may not be a finite q·kᵀ: a masked score can be -inf, whose softmax is no longer 1."""
    while scores.target in SCALING and not any(isinstance(factor, Node) for factor in scores.args[1:]):
        scores = scores.args[0]
    if scores.target in PRODUCTS or (scores.target is aten.baddbmm.default and argument(scores, "beta") == 0):
        return None
    return (
        f"what the softmax reads is not a plain product of query and key ({path_of(scores)}: %{scores.name}); a mask?"
    )
