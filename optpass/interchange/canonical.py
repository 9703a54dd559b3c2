"""An exported program → a graph in the canonical dialect.

Every rewrite here keeps the function bit for bit; what cannot be kept (an in-place operator that
``torch.export`` could not make functional) is refused with the module it came from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from optpass.errors import UserError
from optpass.interchange.inplace import make_functional
from optpass.ir.dialect import ALIASES, CASTS, EXPANSIONS, IDENTITIES, is_assertion, is_inplace
from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import PATH, Graph
from optpass.ir.signature import Signature
from optpass.ir.sizes import sizes_of
from optpass.quiet import first_lines, quiet_export

aten = torch.ops.aten
NO_MODULE = "_empty_nn_module_stack"
"""What torch.export calls the module of the size computations that it adds itself."""


def canonicalise(exported: ExportedProgram, signature: Signature, dimensions: Dimensions = FIXED) -> Graph:
    """The graph of ``exported`` in the dialect; parameters, buffers and constants become ``get_attr``.

    Raises:
        UserError: the model mutates its inputs or buffers, or keeps an operator outside the dialect.
    """
    make_functional(exported.graph)
    if any(map(_needs_functionalising, exported.graph.nodes)):
        # An empty table decomposes nothing; what remains of run_decompositions is functionalisation,
        # and the inlining of autocast and no_grad blocks.
        exported = _functional(exported)
    _refuse_mutation(exported)
    graph = Graph(fx.Graph(), signature, dimensions)
    graph.fx.output(graph.fx.graph_copy(exported.graph, {}))
    _lift_weights(graph, exported)
    for node in list(graph.fx.nodes):
        _set_provenance(node)
    for node in graph.calls:
        _canonicalise_node(graph, node)
    _drop_unread_inputs(graph, exported)
    graph.output_node.args = (tuple(graph.output_node.args[0]),)  # type: ignore[arg-type]
    graph.remove_dead_code()
    return graph


def _functional(exported: ExportedProgram) -> ExportedProgram:
    try:
        with quiet_export():
            functional: ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        raise UserError(
            f"the captured graph writes to what it must not: {first_lines(error)}; capture a functional form"
        ) from error
    return functional


def _needs_functionalising(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return is_inplace(node.target) and node.target not in IDENTITIES


def _refuse_mutation(exported: ExportedProgram) -> None:
    signature = exported.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise UserError(f"the model writes to {', '.join(map(repr, mutated))} while it runs; capture a functional form")


def _lift_weights(graph: Graph, exported: ExportedProgram) -> None:
    """Replace placeholders of parameters, buffers and constants by ``get_attr`` of their names."""
    targets = {
        spec.arg.name: spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target
    }
    for node in graph.placeholders:
        if node.name not in targets:
            continue
        with graph.before(node):
            weight = graph.fx.get_attr(targets[node.name])
        weight.meta = dict(node.meta)
        node.replace_all_uses_with(weight)
        graph.fx.erase_node(node)
    # Placeholders must stand first, and weights now stand between them.
    first = graph.fx._root
    for node in reversed(graph.placeholders):
        first.append(node)


def _drop_unread_inputs(graph: Graph, exported: ExportedProgram) -> None:
    """Placeholders of non-tensor arguments (``None``, flags) have no place in a flat signature."""
    constants = {
        spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT and not isinstance(exported_value(exported, spec.arg.name), Tensor)
    }
    for node in graph.placeholders:
        if node.name in constants and not node.users:
            graph.fx.erase_node(node)


def exported_value(exported: ExportedProgram, name: str) -> Any:
    """The fake value of the placeholder called ``name``."""
    return next((n.meta.get("val") for n in exported.graph.nodes if n.name == name), None)


def _set_provenance(node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    if path.startswith(NO_MODULE):
        path = ""
    # torch.export suffixes the path of a module that is called again with "@1", "@2" …
    node.meta[PATH] = path.split("@")[0]
    for key in set(node.meta) - {"val", PATH, "nn_module_stack"}:
        del node.meta[key]


def _canonicalise_node(graph: Graph, node: fx.Node) -> None:
    if is_assertion(node):
        graph.fx.erase_node(node)
    elif node.target in IDENTITIES:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.fx.erase_node(node)
    elif node.target in CASTS:
        _canonicalise_cast(graph, node)
    elif node.target is aten._native_batch_norm_legit_no_training.default:
        _canonicalise_batch_norm(node)
    elif node.target in ALIASES:
        _respell_reshape(graph, node)
    elif node.target in EXPANSIONS:
        _respell_expand(graph, node)


def _canonicalise_cast(graph: Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        node.replace_all_uses_with(source)
        graph.fx.erase_node(node)
        return
    node.target = aten.to.dtype
    node.args, node.kwargs = (source, dtype), {}


def _canonicalise_batch_norm(node: fx.Node) -> None:
    """Functionalisation turns ``batch_norm`` into an operator of three results, of which inference has one."""
    *operands, momentum, eps = node.args
    for user in list(node.users):
        user.replace_all_uses_with(node)
    node.target = aten.batch_norm.default
    node.args = (*operands, False, momentum, eps, False)
    node.meta["val"] = node.meta["val"][0]


def _respell_reshape(graph: Graph, node: fx.Node) -> None:
    """``view`` and its relatives → ``reshape(operand, sizes)``, open sizes as the nodes that compute them."""
    source: Any = node.args[0]
    with graph.before(node):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        elif node.target in (aten.view_as.default, aten.reshape_as.default):
            sizes = graph.sizes(node.args[1])  # type: ignore[arg-type]
        else:
            sizes = graph.sizes(node)
    _respell(node, aten.reshape.default, source, sizes)


def _respell_expand(graph: Graph, node: fx.Node) -> None:
    with graph.before(node):
        like = node.target is aten.expand_as.default
        sizes: Any = graph.sizes(node.args[1]) if like else list(node.args[1])  # type: ignore[arg-type]
    _respell(node, aten.expand.default, node.args[0], sizes)


def _respell(node: fx.Node, target: Any, source: Any, sizes: list[Any]) -> None:
    """Spell ``node`` as ``target(source, sizes)``; sizes that are fixed in its result stand as numbers."""
    known = sizes_of(node.meta["val"])
    node.target = target
    node.args = (source, [k if isinstance(k, int) else size for k, size in zip(known, sizes, strict=True)])
    node.kwargs = {}
