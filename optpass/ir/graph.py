"""A graph in the canonical dialect: functional ATen calls over named inputs and weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node, map_arg

from optpass.errors import UserError
from optpass.ir.signature import Signature
from optpass.ir.weights import Expression, Shape, WeightStore, dtype_name

PATH = "path"
"""Key of ``node.meta`` that holds a node's provenance: the path of the module it came from."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a graph's input or output."""

    name: str
    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}: {dtype_name(self.dtype)}{list(self.shape)}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": dtype_name(self.dtype)}


@dataclass
class Graph:
    """An FX graph whose ``get_attr`` nodes name weights of the Program's store.

    Every node carries a fake tensor under ``meta["val"]`` (shape, dtype) and its provenance under
    ``meta["path"]``. Placeholders stand in the order of ``signature.inputs``, the output node
    returns a flat tuple in the order of ``signature.outputs``.
    """

    fx: FxGraph
    signature: Signature

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
        return tuple(map(_spec, self.signature.inputs, self.placeholders))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(_spec, self.signature.outputs, self.output_node.args[0]))  # type: ignore[arg-type]

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
        return Graph(duplicate, self.signature)

    def call(self, operator: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """Insert ``operator(*args)`` at the current insertion point, with its shape inferred.

        ``like`` is the node whose module the new one belongs to.
        """
        node = self.fx.call_function(operator, args, kwargs)
        _inherit_provenance(node, like)
        node.meta["val"] = self.infer(node)
        return node

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
        with self.mode, torch.no_grad():
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
        return graph_module(root, self.fx)

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
    """The shape of a single-result node."""
    return tuple(value_of(node).shape)


def _spec(name: str, node: Node) -> TensorSpec:
    value = value_of(node)
    if not all(isinstance(size, int) for size in value.shape):
        raise UserError(f"{name}: symbolic sizes {list(value.shape)} are not supported; give fixed --inputs")
    return TensorSpec(name, tuple(value.shape), value.dtype)
