"""A canonical graph → an ONNX file: dynamo export on fakes, weights streamed, nodes named by module path.

Initializers are lazy: the optimiser reads only the small ones that it folds; the rest is streamed
(:mod:`optpass.interchange.external_data`). Every target that takes ONNX starts here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from optpass.errors import OptpassError, UserError
from optpass.interchange.external_data import ExternalData, holds_slot, lazy_tensor
from optpass.interchange.onnx_quantized import (
    dequantize_last,
    opset_for,
    read_zero_points,
    translations,
    write_zero_points,
)
from optpass.interchange.onnx_simplify import simplify
from optpass.ir.graph import Graph
from optpass.ir.sizes import unguarded
from optpass.ir.weights import Permute, WeightStore

if TYPE_CHECKING:
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
OPSET = 20
"""The first operator set with GELU as one operator, which kernels and NPU compilers take whole."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class OnnxFacts:
    """What was written: nodes, bytes of the model and its weights, the fraction of nodes that carry a module path."""

    nodes: int
    bytes: int
    named: float


def write_onnx(
    graph: Graph,
    weights: WeightStore,
    path: Path,
    data: ExternalData,
    *,
    opset: int = OPSET,
    optimize: bool = True,
    rewrite: Callable[[ir.Model], object] | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> OnnxFacts:
    """Write ``path``, and its weights into ``data``, an open file in the same folder.

    ``rewrite`` changes the optimised model in place, as a compiler behind it likes it; weights have no values yet.
    Inputs and outputs have the signature's names and order; an output that is named as an input is called
    ``NAME.out``, for ONNX has one name for one value.

    Raises:
        UserError: the exporter has no translation for something in the graph; the message names the node.
        WeightError: a weight holds NaN or Inf (unless ``data`` allows it), or cannot be read.
    """
    import onnx_ir

    progress("export to ONNX", 0.0)
    model = _exported(graph, opset)
    read_zero_points(model)
    dequantize_last(model)
    _make_lazy(model, weights, data.allow_nonfinite)
    progress("export to ONNX", 1.0)
    if optimize:
        progress("optimise the ONNX graph", 0.0)
        if failure := _optimise(model):
            raise failure
        progress("optimise the ONNX graph", 1.0)
    write_zero_points(model)
    if rewrite is not None:
        rewrite(model)
    _name_sizes(model, graph)
    named = _name_nodes(model)
    size = data.unload(model, lambda fraction: progress("write the weights", fraction))
    onnx_ir.save(model, path)
    return OnnxFacts(len(model.graph), size + path.stat().st_size, named)


@contextmanager
def quiet_onnx() -> Iterator[None]:
    """Without the exporter's notes about torchvision, the versions of what it registers, and old pytrees."""
    from optpass.quiet import quiet, quiet_export

    with quiet("torch.onnx"), quiet("onnx_ir"), quiet_export():
        yield


def _exported(graph: Graph, opset: int) -> ir.Model:
    import torch

    from optpass.interchange.exported import to_exported
    from optpass.quiet import first_lines

    exported, inputs = to_exported(_with_own_outputs(graph)), graph.signature.inputs
    outputs = [f"{name}.out" if name in inputs else name for name in graph.signature.outputs]
    try:
        with quiet_onnx(), unguarded(graph.mode):
            program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                opset_version=opset_for(graph, opset),
                custom_translation_table=translations(),
                input_names=list(inputs),
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:
        raise UserError(f"ONNX cannot express this graph: {first_lines(_root(error), 6)}") from error
    assert program is not None
    return program.model


def _with_own_outputs(graph: Graph) -> Graph:
    """``graph`` with a copy behind every output that is an input, a weight or another output.

    ONNX has one name for one value: without, the exporter renames what the caller calls by its name.
    """
    import torch

    results: Any = graph.output_node.args[0]
    if len(set(results)) == len(results) and all(node.op == "call_function" for node in results):
        return graph
    own = graph.copy()
    copied: Any = own.output_node.args[0]
    returned: list[Any] = []
    with own.before(own.output_node):
        for node in copied:
            is_own = node.op == "call_function" and node not in returned
            returned.append(node if is_own else own.call(torch.ops.aten.clone.default, node, like=node))
    own.output_node.args = (tuple(returned),)
    return own


def _optimise(model: ir.Model) -> OptpassError | None:
    """Simplify ``model`` in place; the error of a weight that could not be read.

    Folding reads small weights, and the optimiser wraps what reading raises. The error is returned and
    not raised here, where it would become part of the chain that it stands in.
    """
    try:
        with quiet_onnx(), _slots_open(model):
            simplify(model)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OptpassError):
            found = found.__cause__
        if found is None:
            raise
        return found
    return None


@contextmanager
def _slots_open(model: ir.Model) -> Iterator[None]:
    """Inside, weights that can be exchanged are inputs of the model: nothing is folded into or out of them."""
    inputs = model.graph.inputs
    slots = [v for v in model.graph.initializers.values() if v.const_value is not None and holds_slot(v.const_value)]
    inputs.extend(slots)
    try:
        yield
    finally:
        for value in slots:
            inputs.remove(value)


def _root(error: BaseException) -> BaseException:
    """The error at the bottom of the exporter's chain, which names the node and the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def untranslatable(graph: Graph) -> Iterator[Node]:
    """The nodes whose operator the exporter neither translates nor decomposes; reads no weight."""
    import torch
    from torch._decomp import decomposition_table

    registry, own = _translations(), translations()
    for node in graph.calls:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload) or registry.is_registered(target) or target in own:
            continue
        if target not in decomposition_table and not target._can_decompose():
            yield node


@lru_cache(maxsize=1)
def _translations() -> Any:
    """The exporter's table of translations, which takes a second to make."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with quiet_onnx():
        return ONNXRegistry.from_torchlib()


def _make_lazy(model: ir.Model, weights: WeightStore, allow_nonfinite: bool) -> None:
    """Put an expression behind every initializer that is a weight, and behind every transposed weight."""
    initializers = model.graph.initializers
    for name in list(initializers):
        if name in weights:
            tensor = lazy_tensor(name, name, weights[name], allow_nonfinite=allow_nonfinite)
            initializers[name].const_value, initializers[name].dtype = tensor, tensor.dtype
    for node in list(model.graph):
        source = (node.inputs[0].name or "") if node.op_type == "Transpose" and node.inputs[0] else ""
        if source not in weights or source not in initializers:
            continue
        # Left in the graph, every session would hold both layouts of the weight.
        order = tuple(node.attributes.get_ints("perm"))
        name = f"{source}.{'transposed' if order == (1, 0) else 'x'.join(map(str, order))}"
        if name not in initializers:
            model.graph.register_initializer(_transposed(name, source, order, weights, allow_nonfinite))
        node.outputs[0].replace_all_uses_with(initializers[name])
        model.graph.remove(node, safe=True)
    for name in [name for name, value in initializers.items() if not value.uses() and name in weights]:
        del initializers[name]


def _transposed(
    name: str, source: str, order: tuple[int, ...], weights: WeightStore, allow_nonfinite: bool
) -> ir.Value:
    import onnx_ir

    tensor = lazy_tensor(name, source, Permute(weights[source], order), allow_nonfinite=allow_nonfinite)
    return onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)


def _name_sizes(model: ir.Model, graph: Graph) -> None:
    """Call open sizes by their dimensions' names, where the exporter has torch's symbols."""
    import onnx_ir

    if not graph.dimensions:
        return
    for values, specs in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = onnx_ir.Shape(spec.shape)
    # Shapes inside speak of the exporter's symbols; every reader infers them again.
    inside = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    for value in inside:
        if value.shape is not None and not value.shape.is_static():
            value.shape = None


def _name_nodes(model: ir.Model) -> float:
    """Name every node ``module.path/value`` (helpers of a translation get ``.Operator`` behind); the fraction named."""
    taken: set[str] = set()
    paths: dict[ir.Node, str] = {}
    named = 0
    for node in model.graph:
        path, value = _provenance(node)
        if path is None:
            # The optimiser's own nodes belong where their operand comes from.
            path = next((paths[p] for p in (v.producer() for v in node.inputs if v) if p in paths), None)
        named += path is not None
        paths[node] = path or "(root)"
        main = node.name in (f"node_{value}", value)
        node.name = _unique(
            f"{paths[node]}/{value if main else f'{value}.{node.op_type}' if value else node.op_type}", taken
        )
    return named / max(len(model.graph), 1)


def module_path(node_name: str) -> str:
    """The module path of a node by its name in a file of ours."""
    return node_name.split("/", 1)[0]


def _provenance(node: ir.Node) -> tuple[str | None, str]:
    """The module path and the FX value that a node was translated from."""
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return None, ""
    *modules, value = ast.literal_eval(scopes)
    return (modules[-1].split("@")[0] if modules else "") or "(root)", value


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
