"""Constants folded and the default rewrites applied to an ONNX model, in time linear in its nodes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

FOLD_LIMIT = 8192
"""Bytes of the largest weight that folding reads, and of the largest that it makes."""

ROUNDS = 2


def simplify(model: ir.Model) -> None:
    """What ``onnxscript.optimizer.optimize_ir`` does, in place, without its one quadratic rule.

    ``slice_split_rule`` has two outputs, for which the matcher goes through the whole graph at every node:
    nine tenths of the time on SVD, whose export has no such pair of slices. ``torch.onnx`` writes ``Split``
    by itself.
    """
    import onnx_ir.passes as passes
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import constant_folding

    each = [
        constant_folding.FoldConstantsPass(
            shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT
        ),
        _rewrites(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
    ]
    passes.Sequential(
        common.InlinePass(),
        passes.PassManager(each, steps=ROUNDS, early_stop=True),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


@cache
def _rewrites() -> Any:
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import slice_split_rule

    return rewriter.RewritePass([rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule])
