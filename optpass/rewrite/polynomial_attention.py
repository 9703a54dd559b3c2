"""PADRe's polynomial: what is put in the place of an attention, products of tokens that are mixed linearly.

    Yᵢ = Aᵢ(X·Bᵢ)        Z₁ = Y₁        Zᵢ₊₁ = Cᵢ(Zᵢ·Dᵢ) ⊙ Yᵢ₊₁        result = Z of the highest degree

B and D mix the channels of a token (a linear layer), A and C the tokens of a channel (a depthwise convolution, padded
to the size of the grid), both with biases, from which the lower degrees come; degree 1 comes from the residual
stream too. No softmax, and a cost that grows with the tokens and not with their square.

Source: Letourneau et al., PADRe, ICLR 2025, arXiv 2407.11306, section 3. Ours: that convolutions are depthwise (dense
ones would cost k² times as much), what rows beside the grid see, and what the parameters begin as.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.ir.graph import PATH, Graph, example_shape, shape_of, value_of
from optpass.ir.weights import Constant, Expression

Start = Literal["zero", "random"]
CONVOLUTION = {1: aten.conv1d.default, 2: aten.conv2d.default}


@dataclass(frozen=True)
class Lattice:
    """Rows ``start`` to ``stop`` (not included) of a sequence, which are neighbours as ``sizes`` says.

    (height, width) on a grid, (length,) in a line.
    """

    start: Any
    stop: Any
    sizes: tuple[Any, ...]


def polynomial_macs(rows: Node, width: int, lattice: Lattice, degree: int, kernel: int) -> int:
    """Of a polynomial of ``rows`` [batch, tokens, d] that gives ``width`` channels, products of tokens included."""
    batch, tokens, channels = example_shape(rows)
    mixing = width * math.prod([kernel] * len(lattice.sizes))
    per_token = degree * (channels * width + mixing) + (degree - 1) * (width * width + mixing + width)
    return batch * tokens * per_token


@dataclass(frozen=True)
class _Tokens:
    """Values of all tokens: ``inside`` [batch, channels, *sizes], ``beside`` [batch, channels, rows] or [… rows, 1]."""

    inside: Node
    beside: Node | None


@dataclass
class PolynomialWriter:
    """Writes a polynomial into ``graph``; its weights are called ``path``.y1.channels.weight and so on.

    The module that it gives the result of is that of ``like``, the layer that goes. ``weights`` are those that exist
    already, of another entry of the Program, and those that are made.
    """

    graph: Graph
    path: str
    like: Node
    degree: int
    kernel: int
    start: Start
    seed: int
    weights: dict[str, Expression] = field(default_factory=dict)

    def write(self, rows: Node, lattice: Lattice) -> Node:
        """The polynomial of ``rows`` [batch, tokens, d] at the insertion point: [batch, tokens, channels of like]."""
        tokens = self._taken_apart(rows, lattice)
        found = self._mixed("y1", tokens)
        for degree in range(2, self.degree + 1):
            one, other = self._mixed(f"z{degree - 1}", found), self._mixed(f"y{degree}", tokens)
            beside = self._product(one.beside, other.beside) if one.beside and other.beside else None
            found = _Tokens(self._product(one.inside, other.inside), beside)
        return self._whole(found, rows, lattice)

    def _taken_apart(self, rows: Node, lattice: Lattice) -> _Tokens:
        batch, count, width = shape_of(rows)
        columns = self._call(aten.permute.default, rows, [0, 2, 1])
        inside = self._slice(columns, lattice.start, lattice.stop, count)
        assert inside is not None
        ends = [self._slice(columns, 0, lattice.start, count), self._slice(columns, lattice.stop, count, count)]
        parts = [part for part in ends if part is not None]
        beside = self._joined(parts)
        if len(lattice.sizes) == 2:
            inside = self._call(aten.reshape.default, inside, [batch, width, *lattice.sizes])
            beside = beside and self._call(aten.unsqueeze.default, beside, 3)
        return _Tokens(inside, beside)

    def _whole(self, found: _Tokens, rows: Node, lattice: Lattice) -> Node:
        inside, beside = found.inside, found.beside
        if len(lattice.sizes) == 2:
            flat = [shape_of(rows)[0], shape_of(inside)[1], lattice.stop - lattice.start]
            inside = self._call(aten.reshape.default, inside, flat)
            beside = beside and self._call(aten.reshape.default, beside, shape_of(beside)[:3])
        if beside is not None:
            others = shape_of(beside)[2]
            parts = (self._slice(beside, 0, lattice.start, others), inside)
            behind = self._slice(beside, lattice.start, others, others)
            inside = self._joined([part for part in (*parts, behind) if part is not None]) or inside
        return self._call(aten.permute.default, inside, [0, 2, 1])

    def _slice(self, value: Node, start: Any, stop: Any, size: Any) -> Node | None:
        """Of the last of three dimensions, which has ``size``; ``None`` where nothing is left."""
        if start == stop:
            return None
        if start == 0 and stop == size:
            return value
        return self._call(aten.slice.Tensor, value, 2, start, stop)

    def _joined(self, parts: list[Node]) -> Node | None:
        if len(parts) < 2:
            return parts[0] if parts else None
        return self._call(aten.cat.default, parts, 2)

    def _mixed(self, name: str, tokens: _Tokens) -> _Tokens:
        """Channels mixed, then tokens.

        A convolution does not reach the rows beside the grid: such a row is mixed with the mean of the grid.
        """
        inside = self._convolved(f"{name}.channels", tokens.inside, 1)
        mixed = self._convolved(f"{name}.tokens", inside, self.kernel)
        if tokens.beside is None:
            return _Tokens(mixed, None)
        beside = self._convolved(f"{name}.channels", tokens.beside, 1)
        place, rank = f"{name}.beside", len(shape_of(inside))
        mean = self._call(aten.mean.dim, inside, list(range(2, rank)), True, name=place)
        shape = (shape_of(inside)[1], *[1] * (rank - 2))
        own, grid, bias = (self._weight(f"{place}.{leaf}", shape) for leaf in ("own", "grid", "bias"))
        terms = [self._product(value, factor, place) for value, factor in ((beside, own), (mean, grid))]
        total = self._call(aten.add.Tensor, *terms, name=place)
        return _Tokens(mixed, self._call(aten.add.Tensor, total, bias, name=place))

    def _convolved(self, name: str, value: Node, kernel: int) -> Node:
        """Pointwise where ``kernel`` is 1, which mixes channels; else depthwise."""
        channels, rank = shape_of(value)[1], len(shape_of(value)) - 2
        is_pointwise = name.endswith("channels")
        width = shape_of(self.like)[-1] if is_pointwise else channels
        weight = self._weight(f"{name}.weight", (width, channels if is_pointwise else 1, *[kernel] * rank))
        bias = self._weight(f"{name}.bias", (width,))
        ones, padding = [1] * rank, [kernel // 2] * rank
        groups = 1 if is_pointwise else channels
        return self._call(CONVOLUTION[rank], value, weight, bias, ones, padding, ones, groups, name=name)

    def _product(self, one: Node, other: Node, name: str = "") -> Node:
        return self._call(aten.mul.Tensor, one, other, name=name)

    def _call(self, operator: Any, *args: Any, name: str = "") -> Node:
        """In the module of the layer that goes, or in the new one ``name``."""
        node = self.graph.call(operator, *args, like=self.like)
        if name:
            node.meta = {"val": node.meta["val"], PATH: f"{self.path}.{name}"}
        return node

    def _weight(self, name: str, shape: tuple[int, ...]) -> Node:
        full = f"{self.path}.{name}"
        if full not in self.weights:
            silent = self.start == "zero" and name == f"y{self.degree}.channels.weight"
            made = torch.zeros(shape) if silent else beginning(full, shape, self.seed)
            self.weights[full] = Constant(made.to(value_of(self.like).dtype))
        return self.graph.weight(full, self.weights[full], like=self.like)


def beginning(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What the parameter ``name`` begins as: weights keep the variance of what they mix, biases are zero.

    Uniform within ±√(3 / inputs), drawn by ``name`` and ``seed``; rows beside the grid begin as row + mean.
    """
    if name.endswith(("own", "grid")):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{seed}".encode()))
    bound = math.sqrt(3 / math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
