"""The form of a quantised Program: which values are integers, and of what kind, as a target's kernels want it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class QuantizationForm:
    """What a target's integer kernels take. Weights are always int8, symmetric, with a scale for each output channel.

    ``signed`` activations are int8, others uint8; ``symmetric`` ones have zero point 0. ``integer_bias``: biases are
    int32 at the product of their operands' scales, without which the kernels are not used. ``sums``: additions whose
    readers all take integers are made in integers (residual streams of convolutional networks); elsewhere that costs
    accuracy and gains nothing. ``products``: both operands of products of activations are integers (attention).
    ``everything``: every value is, as devices without floating-point units need it; with ``handing_on``, operators that
    compare, move and join values take integers of one scale and give them as they are. ``wide`` activations are uint16.
    """

    signed: bool = True
    symmetric: bool = True
    integer_bias: bool = False
    sums: bool = False
    products: bool = False
    everything: bool = False
    handing_on: bool = False
    wide: bool = False

    @property
    def dtype(self) -> torch.dtype:
        if self.wide:
            return torch.uint16
        return torch.int8 if self.signed else torch.uint8

    @property
    def bounds(self) -> tuple[int, int]:
        if self.wide:
            return 0, 65535
        return (-128, 127) if self.signed else (0, 255)

    @property
    def widened(self) -> QuantizationForm:
        """The same with activations of 16 bits, which have zero points."""
        return replace(self, wide=True, signed=False, symmetric=False)

    @property
    def narrowed(self) -> QuantizationForm:
        """The same with activations of 8 bits."""
        return replace(self, wide=False)


PORTABLE = QuantizationForm()
"""What every compiler takes: symmetric int8 at convolutions and matrix products, biases as they are."""
CPU = QuantizationForm(signed=False, symmetric=False, integer_bias=True, sums=True)
"""What x86 kernels are fastest with: unsigned activations against signed weights (VNNI's own product)."""
INTEGER = QuantizationForm(symmetric=False, everything=True, handing_on=True)
"""What devices without floating-point units take."""
FORMS: Mapping[str, QuantizationForm] = {"portable": PORTABLE, "cpu": CPU, "integer": INTEGER}


@dataclass(frozen=True)
class WeightScheme:
    """How weights become integers: ``bits`` each, symmetric or not; in groups of ``group_size`` along a row, or by
    channel where that is 0."""

    bits: int = 8
    symmetric: bool = True
    group_size: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """The integers that are used; −128 is not, so that a weight and its negative have the same step."""
        half = 1 << (self.bits - 1)
        if not self.symmetric:
            return 0, 2 * half - 1
        return (1 - half if self.bits == 8 else -half), half - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8


CHANNELS = WeightScheme()
"""Weights beside quantised activations."""
