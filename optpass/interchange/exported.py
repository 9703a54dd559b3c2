"""A canonical graph → ``torch.export.ExportedProgram``, the form that exporters and other tools take.

The graph is lifted as it stands, not traced again: node names and provenance survive, and SVD's
5,400 nodes take a second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils._pytree import tree_structure
from torch.utils._sympy.value_ranges import ValueRanges

from optpass.errors import DialectError
from optpass.ir.graph import PATH, Graph, shape_of


def to_exported(graph: Graph) -> ExportedProgram:
    """``graph`` as an exported program over fake weights: to serialise or to lower, never to run.

    Weights are inputs under their own names (floating ones as parameters, others as buffers), the
    call takes the flat tensors of ``signature.inputs`` in order and returns those of ``signature.outputs``.

    Raises:
        DialectError: torch's verifier refuses the graph; the message names what it refuses.
    """
    lifted = FxGraph()
    copies: dict[Node, Node] = {}
    inputs, state = _lift_weights(graph, lifted, copies)
    for node in [*graph.placeholders, *graph.calls]:
        copies[node] = lifted.node_copy(node, copies.__getitem__)
        copies[node].meta = {"val": node.meta["val"], "nn_module_stack": _module_stack(node)}
    arguments = [TensorArgument(copies[node].name) for node in graph.placeholders]
    inputs += [InputSpec(InputKind.USER_INPUT, argument, None) for argument in arguments]
    returned: Any = graph.output_node.args[0]
    results = [copies[node] for node in returned]
    lifted.output(tuple(results)).meta["val"] = tuple(node.meta["val"] for node in results)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    call = ModuleCallSignature(
        inputs=list(arguments),
        outputs=[spec.arg for spec in outputs],
        in_spec=tree_structure((tuple(arguments), {})),
        out_spec=tree_structure(tuple(results)),
        forward_arg_names=[argument.name for argument in arguments],
    )
    try:
        return ExportedProgram(
            root=nn.Module(),
            graph=lifted,
            graph_signature=ExportGraphSignature(inputs, outputs),
            state_dict=state,
            range_constraints=_ranges(graph),
            module_call_graph=[ModuleCallEntry("", call)],
        )
    except Exception as error:
        raise DialectError(f"the graph is no exported program: {str(error).strip()}") from error


def _lift_weights(graph: Graph, lifted: FxGraph, copies: dict[Node, Node]) -> tuple[list[InputSpec], dict[str, Tensor]]:
    """One placeholder a weight, in first use; its name is none of the graph's own."""
    taken = {node.name for node in graph.fx.nodes if node.op != "get_attr"}
    specs: list[InputSpec] = []
    state: dict[str, Tensor] = {}
    placeholders: dict[str, Node] = {}
    for node in graph.fx.nodes:
        if node.op != "get_attr":
            continue
        name, value = str(node.target), node.meta["val"]
        if name not in placeholders:
            trainable = value.is_floating_point() or value.is_complex()
            placeholder = lifted.placeholder(_free_name(f"{'p' if trainable else 'b'}_{name.replace('.', '_')}", taken))
            taken.add(placeholder.name)
            placeholder.meta = {"val": value}
            placeholders[name] = placeholder
            kind = InputKind.PARAMETER if trainable else InputKind.BUFFER
            specs.append(InputSpec(kind, TensorArgument(placeholder.name), name, None if trainable else True))
            state[name] = nn.Parameter(value, requires_grad=False) if trainable else value
        copies[node] = placeholders[name]
    return specs, state


def _ranges(graph: Graph) -> dict[Any, ValueRanges[Any]]:
    """The range of every symbol, in units of its step."""
    found: dict[Any, ValueRanges[Any]] = {}
    for node in graph.placeholders:
        for size in shape_of(node):
            for symbol in getattr(size, "free_symbols", ()):
                item = next(item for item in graph.dimensions if item.symbol == str(symbol))
                found[symbol] = ValueRanges(item.minimum // item.step, item.maximum // item.step)
    return found


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _module_stack(node: Node) -> dict[str, tuple[str, str]]:
    """The node's module stack, whose last path is its provenance; what a pass moved gets a level more."""
    stack: dict[str, tuple[str, str]] = dict(node.meta.get("nn_module_stack") or {})
    path = str(node.meta.get(PATH, ""))
    last = next(reversed(stack.values()))[0].split("@")[0] if stack else ""
    return stack if path == last else {**stack, f"provenance_{path}": (path, "")}
