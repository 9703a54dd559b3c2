"""SkipAt's parametric function Φ: what is put in the place of an attention, from the one before.

    Φ(Z) = ECA(FC₂(GELU(DwConv(GELU(FC₁(Z))))))

FC₁ makes 2·d channels of d and FC₂ d again; DwConv is a depthwise 5×5 convolution over the grid of tokens, padded to
its size; ECA multiplies every channel by σ(w ∗ mean over tokens), w being one kernel of three for all channels.

Source: Venkataramanan et al., arXiv 2301.02240, section 3, in the released form, which has the two activations. What
the parameters begin as is ours.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.analysis.token_grids import Grid
from optpass.ir.graph import PATH, Graph, shape_of, value_of
from optpass.ir.weights import Constant, Expression

EXPANSION, KERNEL, NEIGHBOURS = 2, 5, 3
STEEPNESS = 4.0
"""Of the start near the identity: GELU(sx) − GELU(−sx) is sx, and GELU of GELU comes nearer to it the larger s is."""
Start = Literal["identity", "random"]


@dataclass(frozen=True)
class Reused:
    """The result of an attention [batch, tokens, d], as its grid's rows and what stands before and behind them."""

    rows: Node
    before: Node | None
    behind: Node | None

    def whole(self, graph: Graph, like: Node) -> Node:
        """All of it again, at the insertion point."""
        parts = [part for part in (self.before, self.rows, self.behind) if part is not None]
        return parts[0] if len(parts) == 1 else graph.call(aten.cat.default, parts, 1, like=like)


def taken_apart(graph: Graph, result: Node, grid: Grid, like: Node) -> Reused:
    """``result`` [batch, tokens, d] at the insertion point, in the module of ``like``."""

    def part(start: Any, stop: Any) -> Node | None:
        if start == stop:
            return None
        if start == 0 and stop == size:
            return result
        return graph.call(aten.slice.Tensor, result, 1, start, stop, like=like)

    size = shape_of(result)[1]
    before, rows, behind = part(0, grid.start), part(grid.start, grid.stop), part(grid.stop, size)
    assert rows is not None
    return Reused(rows, before, behind)


@dataclass
class PhiWriter:
    """Writes Φ into ``graph``; its weights are called ``path``.fc1.weight and so on.

    ``weights`` are those that exist already, of another entry of the Program, and those that are made.
    """

    graph: Graph
    path: str
    seed: int
    start: Start
    weights: dict[str, Expression] = field(default_factory=dict)

    def write(self, rows: Node, grid: Grid) -> Node:
        """Φ of ``rows`` [batch, frames · height · width, d] at the insertion point."""
        batch, count, width = shape_of(rows)
        hidden = self._gelu("act1", self._linear("fc1", rows, EXPANSION * width))
        shape = [batch * grid.frames, grid.height, grid.width, EXPANSION * width]
        image = self._call("dwconv", rows, aten.reshape.default, hidden, shape)
        image = self._call("dwconv", rows, aten.permute.default, image, [0, 3, 1, 2])
        image = self._gelu("act2", self._depthwise("dwconv", image))
        hidden = self._call("dwconv", rows, aten.permute.default, image, [0, 2, 3, 1])
        hidden = self._call("dwconv", rows, aten.reshape.default, hidden, [batch, count, EXPANSION * width])
        return self._attended("eca", self._linear("fc2", hidden, width))

    def _call(self, name: str, like: Node, operator: Any, *args: Any) -> Node:
        node = self.graph.call(operator, *args, like=like)
        node.meta = {"val": node.meta["val"], PATH: f"{self.path}.{name}"}
        return node

    def _gelu(self, name: str, value: Node) -> Node:
        return self._call(name, value, aten.gelu.default, value)

    def _linear(self, name: str, value: Node, width: int) -> Node:
        weight = self._weight(f"{name}.weight", value, (width, shape_of(value)[-1]))
        bias = self._weight(f"{name}.bias", value, (width,))
        return self._call(name, value, aten.linear.default, value, weight, bias)

    def _depthwise(self, name: str, image: Node) -> Node:
        channels = shape_of(image)[1]
        weight = self._weight(f"{name}.weight", image, (channels, 1, KERNEL, KERNEL))
        bias = self._weight(f"{name}.bias", image, (channels,))
        padding = [KERNEL // 2] * 2
        return self._call(name, image, aten.conv2d.default, image, weight, bias, [1, 1], padding, [1, 1], channels)

    def _attended(self, name: str, rows: Node) -> Node:
        """ECA: every channel by what the means of itself and of its neighbours say."""
        mean = self._call(name, rows, aten.mean.dim, rows, [1], True)
        kernel = self._weight(f"{name}.weight", rows, (1, 1, NEIGHBOURS))
        gate = self._call(name, rows, aten.conv1d.default, mean, kernel, None, [1], [NEIGHBOURS // 2])
        return self._call(name, rows, aten.mul.Tensor, rows, self._call(name, rows, aten.sigmoid.default, gate))

    def _weight(self, name: str, like: Node, shape: tuple[int, ...]) -> Node:
        full = f"{self.path}.{name}"
        if full not in self.weights:
            made = near_identity(name, shape) if self.start == "identity" else uniform(full, shape, self.seed)
            self.weights[full] = Constant(made.to(value_of(like).dtype))
        return self.graph.weight(full, self.weights[full], like=like)


def near_identity(name: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter ``name`` of a Φ that is near Φ(Z) = Z: an attention's result is near that of the one before.

    FC₁ has every channel with both signs, of which the activations let one pass; the convolution passes its middle.
    """
    made = torch.zeros(shape)
    if name == "fc1.weight":
        for half, sign in zip(made.chunk(2), (1, -1), strict=True):
            half.fill_diagonal_(sign * STEEPNESS)
    elif name == "fc2.weight":
        # ECA begins as σ(0) = ½.
        for half, sign in zip(made.chunk(2, 1), (1, -1), strict=True):
            half.fill_diagonal_(sign * 2 / STEEPNESS)
    elif name == "dwconv.weight":
        made[..., KERNEL // 2, KERNEL // 2] = 1
    return made


def uniform(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Within ±1/√(inputs), as PyTorch's layers begin, drawn by ``name`` and ``seed``; biases are zero."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{seed}".encode()))
    bound = prod(shape[1:]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
