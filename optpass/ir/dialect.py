"""The canonical dialect and its verifier, which runs after capture and after every pass.

In the dialect: ``placeholder``, ``get_attr`` of a weight, ``call_function`` of a functional ATen
operator or ``getitem``, one flat ``output``. Out of it: in-place operators, operators that are
the identity in inference (:data:`IDENTITIES`), layouts (:data:`ALIASES`), assertions and guards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from optpass.errors import DialectError
from optpass.ir.graph import PATH, Graph
from optpass.ir.loop_legality import loop_problems
from optpass.ir.program import Program
from optpass.ir.sizes import SYMBOLIC, is_size, size_of, sizes_of
from optpass.ir.weights import WeightStore, dtype_name

aten = torch.ops.aten

IDENTITIES = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.detach.default,
        aten.detach_.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
        aten.lift_fresh.default,
        aten.positive.default,
    }
)
"""Operators that return their first operand unchanged, values being all that the dialect knows."""

ALIASES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.view_as.default,
        aten.reshape_as.default,
    }
)
"""Operators that the dialect spells ``reshape``."""

EXPANSIONS = frozenset({aten.broadcast_to.default, aten.expand_as.default})
"""Operators that the dialect spells ``expand``."""

CASTS = frozenset(
    {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default}
)
"""Operators that the dialect spells ``to.dtype``, and drops where the dtype does not change."""


def is_assertion(node: fx.Node) -> bool:
    """Run-time checks that export leaves behind: ``_assert_tensor_metadata``, ``sym_constrain_range`` …"""
    name = str(node.target)
    return name.startswith(("aten._assert", "aten.sym_constrain_range", "aten._check"))


def is_inplace(target: Any) -> bool:
    """Whether an operator writes to an operand."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def verify(program: Program) -> None:
    """Check every entry against the dialect, and the loop over them.

    Raises:
        DialectError: with every violation found, one a line, each naming its node and module.
    """
    for name, graph in program.entries.items():
        problems = list(_problems(graph, program.weights))
        if problems:
            shown = "\n  ".join(problems[:20])
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise DialectError(f"entry {name!r} left the canonical dialect:\n  {shown}{more}")
    if program.loop and (problems := loop_problems(program.loop, program.interfaces)):
        raise DialectError("the loop is not legal:\n  " + "\n  ".join(problems))


def _problems(graph: Graph, weights: WeightStore) -> Iterator[str]:
    try:
        graph.fx.lint()
    except (RuntimeError, AssertionError) as error:
        yield str(error).splitlines()[0]
        return
    yield from _interface_problems(graph)
    for node in graph.fx.nodes:
        if node.op == "output":
            continue
        if problem := _node_problem(node, weights):
            yield f"%{node.name} ({node.meta.get(PATH) or node.op}): {problem}"


def _interface_problems(graph: Graph) -> Iterator[str]:
    if len(graph.placeholders) != len(graph.signature.inputs):
        yield f"{len(graph.placeholders)} inputs where the signature has {len(graph.signature.inputs)}"
    results = graph.output_node.args[0]
    if not isinstance(results, (tuple, list)) or not all(isinstance(result, fx.Node) for result in results):
        yield "the output is not a flat tuple of values"
    elif len(results) != len(graph.signature.outputs):
        yield f"{len(results)} outputs where the signature has {len(graph.signature.outputs)}"
    symbols = {
        str(s) for node in graph.placeholders for size in _sizes(node) for s in getattr(size, "free_symbols", ())
    }
    for item in graph.dimensions:
        if item.symbol not in symbols:
            yield f"the dimension {item.name} ({item}) is open no more: something compared it with a number"


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return sizes_of(value) if isinstance(value, Tensor) else ()


def _node_problem(node: fx.Node, weights: WeightStore) -> str:
    value = node.meta.get("val")
    if value is None:
        return "has no fake value (meta['val'])"
    if node.op == "get_attr":
        return _weight_problem(str(node.target), value, weights)
    if node.op == "placeholder":
        return ""
    if node.op != "call_function":
        return f"{node.op} nodes are not part of the dialect"
    if PATH not in node.meta:
        return "has no provenance (meta['path']); create nodes with Graph.call"
    if any(isinstance(item, SYMBOLIC) for item in tree_leaves((node.args, node.kwargs))):
        return "holds a symbolic size among its arguments; create nodes with Graph.call"
    if node.target is operator.getitem or is_size(node):
        return ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target} is not an ATen operator"
    if is_inplace(node.target):
        return f"{node.target} works in place"
    if node.target in IDENTITIES or is_assertion(node):
        return f"{node.target} has no meaning in inference"
    if node.target in ALIASES | EXPANSIONS:
        return f"{node.target} has a canonical spelling"
    return _cast_problem(node)


def _cast_problem(node: fx.Node) -> str:
    if node.target not in CASTS:
        return ""
    if node.target is not aten.to.dtype:
        return f"{node.target} is spelt to.dtype"
    source: Any = node.args[0]
    if isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype:
        return "is a cast that changes nothing"
    return ""


def _weight_problem(name: str, value: Any, weights: WeightStore) -> str:
    if name not in weights:
        return "is not in the weight store"
    expression = weights[name]
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(expression.shape):
        return f"has shape {tuple(value.shape)} in the graph and {expression.shape} in the store"
    if value.dtype != expression.dtype:
        return f"is {dtype_name(value.dtype)} in the graph and {dtype_name(expression.dtype)} in the store"
    return ""


def verify_shapes(program: Program) -> None:
    """Recompute every node's shape and dtype and compare with what the graph says.

    Raises:
        DialectError: a node's operands do not fit it, or its recorded shape or dtype is stale.
    """
    for name, graph in program.entries.items():
        for node in graph.calls:
            try:
                found = _layout(graph.infer(node))
            except Exception as error:
                message = str(error).strip().splitlines()[0]
                raise DialectError(f"entry {name!r}: %{node.name} ({node.meta.get(PATH)}): {message}") from error
            if found != _layout(node.meta["val"]):
                raise DialectError(
                    f"entry {name!r}: %{node.name} ({node.meta.get(PATH)}) says {_layout(node.meta['val'])}"
                    f" and computes {found}"
                )


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return sizes_of(value), value.dtype
    if isinstance(value, (list, tuple)):
        return [_layout(item) for item in value]
    return size_of(value)
