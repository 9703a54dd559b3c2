"""Affine maps over channels, as records.

A linear layer is a convolution without spatial axes, so one record holds both: its channels lie along the last
dimension where it has no spatial axes, and along dimension 1 where it has some. What acts on each channel alone
(a BatchNorm in inference, a layer scale) is the grouped case with as many groups as channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import NamedTuple

from optpass.analysis.affine.expressions import is_ones, reshaped, spread
from optpass.ir.algebra import Full
from optpass.ir.weights import Expression, Shape


class NotExactError(Exception):
    """Two maps have no common one of this kind that computes the same at the borders; says why."""


class Price(NamedTuple):
    """What an operator costs, compared in this order: multiply-accumulates, stored weight elements, nodes."""

    macs: float
    weights: float | Fraction
    nodes: float

    def plus(self, other: Price) -> Price:
        return Price(self.macs + other.macs, self.weights + other.weights, self.nodes + other.nodes)

    def shared(self, users: int) -> Price:
        """One user's part."""
        return Price(self.macs / users, self.weights / users, self.nodes / users)


FREE = Price(0, 0, 0)


@dataclass(frozen=True, eq=False)
class Uniform:
    """x ↦ scale·x + shift with scalars (shape ``()``); no shift is None. The identity has scale 1 and no shift."""

    scale: Expression
    shift: Expression | None = None

    def along(self, channels: int, spatial: int) -> Affine:
        """The same map over ``channels`` in front of ``spatial`` kernel axes."""
        weight = spread(self.scale, (channels, 1, *[1] * spatial))
        bias = None if self.shift is None else spread(self.shift, (channels,))
        return channelwise(weight, bias, spatial)

    def price(self, shape: Shape) -> Price:
        parts = [part for part in (None if is_ones(self.scale) else self.scale, self.shift) if part is not None]
        return Price(0, sum(not isinstance(part, Full) for part in parts), len(parts))


@dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ W∗x + b: ``weight`` is [out, in / groups, *kernel], ``bias`` [out] or None, sizes per kernel axis.

    Padding is of zeros, by ``padding`` on both sides.
    """

    weight: Expression
    bias: Expression | None
    groups: int
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @property
    def kernel(self) -> Shape:
        return self.weight.shape[2:]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def is_channelwise(self) -> bool:
        """Whether each channel depends on the same channel alone."""
        return self.groups == self.inputs == self.outputs

    @property
    def is_pointwise(self) -> bool:
        """Whether each position depends on the same position alone."""
        return prod(self.kernel) == prod(self.stride) == 1 and not any(self.padding)

    @property
    def is_elementwise(self) -> bool:
        return self.is_channelwise and self.is_pointwise

    @property
    def is_view(self) -> bool:
        """Whether it changes nothing but the arrangement of what lies along its channels."""
        return self.is_elementwise and is_ones(self.weight) and self.bias is None

    def price(self, shape: Shape) -> Price:
        """As one operator whose result has ``shape``; scale and shift per channel have no products that count."""
        bias = 0 if self.bias is None else self.outputs
        if self.is_elementwise:
            scale = 0 if is_ones(self.weight) else self.outputs
            return Price(0, scale + bias, (scale > 0) + (bias > 0))
        # There is no grouped linear: without spatial axes it is dense.
        fan_in = prod(self.weight.shape[1:]) * (1 if self.spatial else self.groups)
        return Price(prod(shape) * fan_in, self.outputs * fan_in + bias, 1)


@dataclass(frozen=True, eq=False)
class Transposed:
    """A transposed convolution: ``weight`` is [in, out / groups, *kernel], ``bias`` [out] or None."""

    weight: Expression
    bias: Expression | None
    groups: int
    stride: Shape
    padding: Shape
    output_padding: Shape
    dilation: Shape

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @property
    def inputs(self) -> int:
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        return self.weight.shape[1] * self.groups

    def price(self, shape: Shape) -> Price:
        """As one operator whose result has ``shape``; it multiplies each element that it reads by a kernel."""
        read = [
            (size - 1 + 2 * p - d * (k - 1) - o) // s + 1
            for size, p, o, d, k, s in zip(
                shape[2:], self.padding, self.output_padding, self.dilation, self.weight.shape[2:], self.stride,
                strict=True,
            )
        ]  # fmt: skip
        bias = 0 if self.bias is None else self.outputs
        return Price(shape[0] * prod(read) * self.weight.numel, self.weight.numel + bias, 1)


Map = Uniform | Affine | Transposed


def channelwise(weight: Expression, bias: Expression | None, spatial: int) -> Affine:
    """Scale and shift per channel; ``weight`` has one element a channel, whatever its shape."""
    channels, ones = weight.numel, (1,) * spatial
    return Affine(reshaped(weight, (channels, 1, *ones)), bias, channels, ones, (0,) * spatial, ones)


def by(sizes: Shape) -> str:
    """``3×3``."""
    return "×".join(map(str, sizes))
