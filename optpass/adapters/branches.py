"""Adapters as branches of the graph beside the layers that they adapt: y + up(down(x)), unmerged.

New weights stand beside the adapted one, in its dtype: ``PATH.lora_A`` and ``PATH.lora_B`` (the scale in the
latter), ``PATH.lora_delta`` for what has no two layers, ``PATH.lora_magnitude`` for DoRA's m/‖W+ΔW‖. A
second adaptation of one weight has ``_2`` behind these names, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.fx import Node

from optpass.adapters.adaptation import Adaptation, direction_scale, merged
from optpass.adapters.sites import ADAPTED, SUFFIX
from optpass.analysis.operators import CONVOLUTIONS, argument
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.ir.weights import Cast, Expression, Scale, Sum, WeightStore

aten = torch.ops.aten

MIXING: dict[Any, Any] = {
    aten.linear.default: aten.linear.default,
    aten.conv1d.default: aten.conv1d.default,
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.default: aten.conv2d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.default: aten.conv3d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
"""What mixes channels alone behind each operator: a convolution's defaults are stride 1 and no padding."""

KINDS = ("lora_A", "lora_B", "lora_delta", "lora_magnitude")

Strengths = Sequence[tuple[Adaptation, float]]
Plan = Mapping[str, Strengths]
"""Adaptations and their strengths by the name of the weight that they adapt, in order."""


def add_branches(program: Program, plan: Plan) -> Program:
    """``program`` with a branch for every adaptation at every layer that reads an adapted weight.

    The graphs of ``program`` are edited: hand in a copy. The base weights stay as they are.

    Raises:
        UserError: an adaptation does not fit the shape of its weight.
    """
    made: dict[str, Expression] = {}
    for graph in program.entries.values():
        for node in graph.calls:
            if node.target in ADAPTED and _weight(node) in plan:
                _Layer(graph, node, program.weights, made).adapt(plan[_weight(node)])
    return program.with_weights(made)


def layer_weights(program: Program, path: str) -> list[Expression]:
    """The weight of the layer at ``path`` and those of its branches."""
    branches = [f"{path}.{kind}{_suffix(n)}" for n in range(1, _free(program.weights, path)) for kind in KINDS]
    return [program.weights[name] for name in (f"{path}{SUFFIX}", *branches) if name in program.weights]


def _free(weights: WeightStore, path: str) -> int:
    """The number of the next branch of the layer at ``path``."""
    return next(n for n in count(1) if not any(f"{path}.{kind}{_suffix(n)}" in weights for kind in KINDS))


def _suffix(number: int) -> str:
    return f"_{number}" if number > 1 else ""


def _weight(node: Node) -> str:
    weight: Any = argument(node, "weight")
    return str(weight.target) if isinstance(weight, Node) and weight.op == "get_attr" else ""


@dataclass
class _Layer:
    """One linear or convolution, which gets branches; ``made`` collects the weights of all layers."""

    graph: Graph
    node: Node
    weights: WeightStore
    made: dict[str, Expression]

    @property
    def path(self) -> str:
        return _weight(self.node).removesuffix(SUFFIX)

    @property
    def base(self) -> Expression:
        return self.weights[_weight(self.node)]

    @property
    def is_convolution(self) -> bool:
        return self.node.target in CONVOLUTIONS

    def adapt(self, adaptations: Strengths) -> None:
        """Put the layer with its branches in the layer's place."""
        users = list(self.node.users)
        with self.graph.before(self.node.next):
            result = self._sum(adaptations)
        for user in users:
            user.replace_input_with(self.node, result)
        if not self.node.users:
            self.graph.fx.erase_node(self.node)

    def _sum(self, adaptations: Strengths) -> Node:
        """y + Σ branches; with DoRA the sum without the bias is scaled, and the bias added after."""
        if any(adaptation.magnitude_of == "in" for adaptation, _ in adaptations):
            return self._add(self.node, self._whole(adaptations))
        bias: Any = argument(self.node, "bias")
        late = bias is not None and any(adaptation.magnitude is not None for adaptation, _ in adaptations)
        result = self._call(self._source, argument(self.node, "weight")) if late else self.node
        for number, (adaptation, strength) in enumerate(adaptations, _free(self.weights, self.path)):
            suffix = _suffix(number)
            result = self._add(result, self._branch(adaptation, strength, suffix))
            if adaptation.magnitude is not None:
                result = self._scaled(result, adaptation, strength, suffix)
        return self._add(result, self._along_channels(bias)) if late else result

    @property
    def _source(self) -> Any:
        return argument(self.node, "input")

    def _add(self, left: Node, right: Node) -> Node:
        return self.graph.call(aten.add.Tensor, left, right, like=self.node)

    def _branch(self, adaptation: Adaptation, strength: float, suffix: str) -> Node:
        """The change of the layer's result: two layers for a plain LoRA, else one with ΔW."""
        groups = argument(self.node, "groups") if self.is_convolution else 1
        if adaptation.kind != "lora" or groups != 1:
            delta = self._new(f"lora_delta{suffix}", adaptation.delta(self.base.shape, strength))
            return self._call(self._source, delta)
        down, up = adaptation.low_rank(self.base.shape, strength)
        inner = self._call(self._source, self._new(f"lora_A{suffix}", down))
        return self.graph.call(MIXING[self.node.target], inner, self._new(f"lora_B{suffix}", up), like=self.node)

    def _whole(self, adaptations: Strengths) -> Node:
        """One layer with the whole change: magnitudes of the inputs scale columns, which no later scaling can do."""
        wide = self._wide_base()
        change = Sum(merged(wide, adaptations), Scale(wide, -1.0))
        return self._call(self._source, self._new("lora_delta", change))

    def _scaled(self, result: Node, adaptation: Adaptation, strength: float, suffix: str) -> Node:
        scale = direction_scale(self._wide_base(), adaptation.delta(self.base.shape, strength), adaptation)
        weight = self._new(f"lora_magnitude{suffix}", scale)
        return self.graph.call(aten.mul.Tensor, result, self._along_channels(weight), like=self.node)

    def _wide_base(self) -> Expression:
        return self.base if self.base.dtype in (torch.float32, torch.float64) else Cast(self.base, torch.float32)

    def _call(self, source: Node, weight: Any) -> Node:
        """The layer's own operator over another weight, without a bias."""
        names = ("stride", "padding", "dilation", "groups") if self.is_convolution else ()
        rest = [argument(self.node, name) for name in names]
        return self.graph.call(self.node.target, source, weight, None, *rest, like=self.node)

    def _along_channels(self, weight: Node) -> Node:
        """A weight of [out], shaped to be broadcast over the layer's result."""
        spatial = len(self.base.shape) - 2
        if not spatial:
            return weight
        return self.graph.call(aten.reshape.default, weight, [self.base.shape[0], *(1,) * spatial], like=self.node)

    def _new(self, name: str, expression: Expression) -> Node:
        """A weight beside the layer's own, in its dtype."""
        name, dtype = f"{self.path}.{name}", self.base.dtype
        self.made[name] = found = expression if expression.dtype == dtype else Cast(expression, dtype)
        return self.graph.weight(name, found, like=self.node)
