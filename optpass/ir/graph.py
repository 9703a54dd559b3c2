"""A graph in the canonical dialect: functional ATen calls over named inputs and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node, map_arg

from optpass.ir.dimensions import FIXED, Dimensions, Size
from optpass.ir.guards import size_at
from optpass.ir.signature import Signature
from optpass.ir.sizes import example_sizes, is_size, materialise, named, open_rules, sizes_of
from optpass.ir.weights import Expression, Shape, WeightStore, dtype_name

PATH = "path"
"""Key of ``node.meta`` that holds a node's provenance: the path of the module it came from."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a graph's input or output; open sizes by the name of their dimension."""

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}: {dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"

    @property
    def is_open(self) -> bool:
        return any(isinstance(size, str) for size in self.shape)

    def at(self, sizes: Mapping[str, int]) -> FixedSpec:
        """An input with every open dimension at its size in ``sizes``."""
        return FixedSpec(
            self.name, tuple(s if isinstance(s, int) else size_at(s, sizes) for s in self.shape), self.dtype
        )

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": dtype_name(self.dtype)}


@dataclass(frozen=True)
class FixedSpec:
    """Name, shape and dtype of a tensor, no size left open."""

    name: str
    shape: Shape
    dtype: torch.dtype


@dataclass
class Graph:
    """An FX graph whose ``get_attr`` nodes name weights of the Program's store.

    Every node carries a fake tensor under ``meta["val"]`` (shape, dtype) and its provenance under
    ``meta["path"]``. Placeholders stand in the order of ``signature.inputs``, the output node
    returns a flat tuple in the order of ``signature.outputs``. Where ``dimensions`` are open, shapes are
    symbolic, and nodes that compute sizes (``sym_size``, integer arithmetic) stand among the operators.
    """

    fx: FxGraph
    signature: Signature
    dimensions: Dimensions = FIXED

    @property
    def placeholders(self) -> list[Node]:
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def output_node(self) -> Node:
        node: Node = next(iter(reversed(self.fx.nodes)))
        return node

    @property
    def calls(self) -> list[Node]:
        """The operator nodes, in execution order."""
        return [node for node in self.fx.nodes if node.op == "call_function"]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(self._spec, self.signature.inputs, self.placeholders))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(self._spec, self.signature.outputs, self.output_node.args[0]))  # type: ignore[arg-type]

    def _spec(self, name: str, node: Node) -> TensorSpec:
        value = value_of(node)
        return TensorSpec(name, tuple(named(size, self.dimensions) for size in value.shape), value.dtype)

    def inputs_at(self, sizes: Mapping[str, int] | None = None) -> tuple[FixedSpec, ...]:
        """The inputs with open dimensions at ``sizes``, or as they were captured."""
        chosen = {**self.dimensions.examples, **(sizes or {})}
        return tuple(spec.at(chosen) for spec in self.inputs)

    @property
    def weight_names(self) -> list[str]:
        """Names of the weights that the graph reads, each once, in first use."""
        return list(dict.fromkeys(str(n.target) for n in self.fx.nodes if n.op == "get_attr"))

    @property
    def mode(self) -> FakeTensorMode:
        """The fake mode that all ``val`` of this graph live in."""
        for node in self.fx.nodes:
            if isinstance(value := node.meta.get("val"), Tensor):
                return value.fake_mode  # type: ignore[attr-defined, no-any-return]
        raise ValueError("the graph has no tensors")

    def copy(self) -> Graph:
        """An independent copy; the fake values, which nobody changes, are shared."""
        duplicate = FxGraph()
        mapping: dict[Node, Node] = {}
        result = duplicate.graph_copy(self.fx, mapping)
        output = duplicate.output(result)
        output.meta = dict(self.output_node.meta)
        return Graph(duplicate, self.signature, self.dimensions)

    def call(self, operator: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """Insert ``operator(*args)`` at the current insertion point, with its shape inferred.

        ``like`` is the node whose module the new one belongs to. Sizes among the arguments may be
        symbolic, as :func:`shape_of` gives them: nodes that compute them are inserted too.
        """
        args, kwargs = _map_sizes((args, kwargs), lambda size: materialise(self.fx, size, self.annotate))
        node = self.fx.call_function(operator, args, kwargs)
        return self.annotate(node, like)

    def annotate(self, node: Node, like: Node | None = None) -> Node:
        """Give a new node its provenance (none without ``like``) and its value."""
        if like is None:
            node.meta[PATH] = ""
        else:
            _inherit_provenance(node, like)
        node.meta["val"] = self.infer(node)
        return node

    def sizes(self, node: Node) -> list[int | Node]:
        """The shape of ``node`` as arguments of a call: whole numbers, and nodes where a size is open."""
        return [materialise(self.fx, size, self.annotate) for size in shape_of(node)]

    def weight(self, name: str, expression: Expression, *, like: Node) -> Node:
        """Insert a read of weight ``name``; the caller puts ``expression`` under it into the store."""
        node = self.fx.get_attr(name)
        _inherit_provenance(node, like)
        with self.mode:
            node.meta["val"] = torch.empty(expression.shape, dtype=expression.dtype)
        return node

    def infer(self, node: Node) -> Any:
        """The fake result of a call node from the fake values of its operands.

        Raises:
            RuntimeError: the operator refuses the operands' shapes or dtypes.
        """
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        with self.mode, torch.no_grad(), open_rules(self.mode) if self.dimensions else nullcontext():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Insert what is created inside in front of ``node``."""
        with self.fx.inserting_before(node):
            yield

    def remove_dead_code(self) -> bool:
        """Erase nodes without users; inputs and the output stay. Nothing else is impure in the dialect."""
        # FX's own test keeps scaled_dot_product_attention and other "random" operators alive.
        return self.fx.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))

    def propagate(self, nodes: Iterable[Node] | None = None) -> None:
        """Recompute ``val`` of ``nodes`` (all calls by default), in order."""
        for node in self.calls if nodes is None else nodes:
            node.meta["val"] = self.infer(node)

    def module(
        self, weights: WeightStore, *, dtype: torch.dtype | None = None, values: Mapping[str, Tensor] | None = None
    ) -> GraphModule:
        """The graph as a module that takes and returns flat tensors, with its weights read into memory.

        This executes the model: it asks for every weight. ``values`` overrides weights by name;
        ``dtype`` converts floating weights (the graph's own casts stay).
        """
        root: dict[str, Any] = {}
        for name in self.weight_names:
            value = values[name] if values and name in values else weights[name].evaluate()
            root[name] = value.to(dtype) if dtype and value.is_floating_point() else value
        # A module owns its graph, and asks it for the tensors of whatever is inserted later.
        return graph_module(root, self.copy().fx)

    def structure(self) -> GraphModule:
        """The graph as a module with fake weights: to export, never to run."""
        root = {str(n.target): n.meta["val"] for n in self.fx.nodes if n.op == "get_attr"}
        return graph_module(root, self.fx)


def graph_module(root: dict[str, Any], graph: FxGraph) -> GraphModule:
    """A GraphModule whose attributes are ``root``'s tensors, integer and bool ones as buffers."""
    for name, value in root.items():
        trainable = value.is_floating_point() or value.is_complex()
        root[name] = torch.nn.Parameter(value, requires_grad=False) if trainable else value
    holder = _Holder(root)
    return GraphModule(holder, graph)


class _Holder(torch.nn.Module):
    """Owns tensors under dotted names, each module level being a plain ``Module``."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in tensors.items():
            *parents, leaf = name.split(".")
            owner: torch.nn.Module = self
            for part in parents:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            if isinstance(value, torch.nn.Parameter):
                owner.register_parameter(leaf, value)
            else:
                owner.register_buffer(leaf, value)


def _inherit_provenance(node: Node, like: Node) -> None:
    node.meta[PATH] = like.meta.get(PATH, "")
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]


def path_of(node: Node) -> str:
    """The module path a node came from; ``(root)`` for the outermost module."""
    return str(node.meta.get(PATH) or "(root)")


def value_of(node: Node) -> Tensor:
    """The fake tensor of a single-result node: shape, dtype, no data."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.name} gives {type(value).__name__}, not one tensor")
    return value


def shape_of(node: Node) -> Shape:
    """The shape of a single-result node.

    Open sizes are SymPy expressions: they add, multiply and compare (by structure) as whole numbers do.
    """
    return sizes_of(value_of(node))


def example_shape(node: Node) -> Shape:
    """The shape of a single-result node at the sizes that the graph was captured with: whole numbers."""
    return example_sizes(value_of(node))


def operators(graph: Graph) -> list[Node]:
    """The nodes that compute tensors, without those that compute sizes."""
    return [node for node in graph.calls if not is_size(node)]


def _map_sizes(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with every symbolic size in it replaced."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map_sizes(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map_sizes(item, function) for key, item in value.items()}
    return function(value) if isinstance(value, sympy.Expr) else value
