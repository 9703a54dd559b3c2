"""The pass ``simplify``."""

from __future__ import annotations

from torch.fx import Node

from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.common_subexpressions import merge_common_subexpressions
from optpass.rewrite.constant_folding import fold_constants
from optpass.rewrite.identities import arithmetic_rules
from optpass.rewrite.rules import apply_rules
from optpass.rewrite.sinking import sink_views
from optpass.rewrite.views import view_rules


class Simplify(Pass):
    """x·1 → x, and every other operator that need not be there → gone.

    To a fixpoint: arithmetic with neutral numbers, double negations, chains of scalars and of casts, attention
    masks that hide nothing; reshapes, permutations, expands, slices and splits that come to nothing or to one;
    common subexpressions; what depends on weights and literals alone, folded into a weight of at most 1 MiB (or
    no larger than the weights that it replaces), still lazy; permutations and reshapes that meet across
    pointwise operators; dead code. The same numbers come out, bit for bit, save the sign of a
    zero and what a kernel rounds differently for a weight that lies in memory the other way round.

    Leaves alone: what would change a NaN (x·0), a rounding (chains of scalars, unless one is a power of two;
    narrowing casts; half-precision arithmetic on weights), a dtype or a shape; repetitions of constants, which
    are cheaper to do than to store; results larger than the bound.

    Source: Aho, Lam, Sethi and Ullman, Compilers, sections 8.5 and 9.4; common practice of ONNX optimisers.
    """

    contract = exact(rtol=1e-6)

    def run(self, program: Program, context: Context) -> Program:
        for entry, graph in program.entries.items():
            _report(_without_dead_code(graph), context, entry)
        changed = True
        while changed:
            program, changed = _round(program, context)
        _keep_standing(program, context)
        return program.pruned()


def _round(program: Program, context: Context) -> tuple[Program, bool]:
    """Everything once, and whether it did anything."""
    rules = (*arithmetic_rules(program.weights), *view_rules())
    count = apply_rules(program, rules, context)
    for entry, graph in program.entries.items():
        count += _report(merge_common_subexpressions(graph, program.weights), context, entry)
        count += _report(sink_views(graph), context, entry)
        program, folded = fold_constants(program, entry)
        count += _report(folded, context, entry)
    return program, count > 0


def _keep_standing(program: Program, context: Context) -> None:
    """Drop what was declined in one round and went in another, and what every round declined again."""
    standing = {(entry, node.name) for entry, graph in program.entries.items() for node in graph.calls}
    context.declined[:] = [item for item in dict.fromkeys(context.declined) if (item.entry, item.node) in standing]


def _report(nodes: list[Node], context: Context, entry: str) -> int:
    for node in nodes:
        context.rewrote(node, entry)
    return len(nodes)


def _without_dead_code(graph: Graph) -> list[Node]:
    before = list(graph.fx.nodes)
    graph.remove_dead_code()
    alive = set(graph.fx.nodes)
    return [node for node in before if node not in alive]
