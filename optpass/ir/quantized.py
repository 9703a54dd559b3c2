"""Quantised values in the IR: the operators of torch's own quantisation dialect, and weights stored as integers.

A quantised activation is ``dequantize(quantize(x))`` with its scale and zero point as numbers; a quantised weight
is an integer weight behind ``dequantize_per_channel`` (or ``_per_channel_group``). The real value is
(q − zero point) · scale. Every target reads that: as QuantizeLinear and DequantizeLinear in ONNX, as it stands in
PyTorch's own compilers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Registers the operators.
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.fx import Node

from optpass.ir.weights import Expression, Shape

_dialect = torch.ops.quantized_decomposed
QUANTIZE = _dialect.quantize_per_tensor.default
DEQUANTIZE = _dialect.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _dialect.dequantize_per_channel.default
DEQUANTIZE_GROUPS = _dialect.dequantize_per_channel_group.default

DEQUANTIZERS = frozenset({DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS})
INT32 = (-(1 << 31), (1 << 31) - 1)


@dataclass(frozen=True)
class Quantizer:
    """An affine map of a tensor to integers: q = clamp(round(x / scale) + zero_point, low, high)."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them behind their tensor."""
        return (self.scale, self.zero_point, self.low, self.high, self.dtype)


def quantizer_of(node: Node) -> Quantizer:
    """What a per-tensor ``quantize`` or ``dequantize`` node does."""
    return Quantizer(*node.args[1:])  # type: ignore[arg-type]


def is_quantized(node: Node) -> bool:
    """Whether ``node`` makes real values of integers."""
    return node.op == "call_function" and node.target in DEQUANTIZERS


@dataclass(frozen=True)
class Steps(Expression):
    """The scales of a weight, by its own extremes: the step from one integer to the next. float32.

    One for each channel along ``axis``, shape [channels]; with ``groups``, the weight being a matrix [out, in] whose
    rows are cut into so many groups, [out, groups]. Symmetric: max|w| / ``high``, or, where ``low`` is one integer
    further from 0, what makes the greater extreme ``low``: the step is then negative where that extreme is positive,
    as NNCF compresses weights. Else (max − min) / (high − low), the range widened to hold 0. Where all values are 0,
    the step is 1.
    """

    operand: Expression
    axis: int
    low: int
    high: int
    symmetric: bool = True
    groups: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return _parameter_shape(self.operand.shape, self.axis, self.groups)

    def evaluate(self) -> Tensor:
        least, most = _extremes(self.operand.evaluate().float(), self.axis, self.groups)
        if not self.symmetric:
            steps = (most - least) / (self.high - self.low)
        elif -self.low > self.high:
            steps = torch.where(-least >= most, least, most) / self.low
        else:
            steps = torch.maximum(-least, most) / self.high
        return torch.where(steps != 0, steps, torch.ones_like(steps))

    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)

    def __str__(self) -> str:
        return f"steps({self.operand}, {_parameters_text(self)})"


@dataclass(frozen=True)
class ZeroPoints(Expression):
    """The zero points that belong to asymmetric :class:`Steps`: round(low − min / step), int32, of the same shape."""

    operand: Expression
    axis: int
    low: int
    high: int
    groups: int = 0
    dtype: torch.dtype = torch.int32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return _parameter_shape(self.operand.shape, self.axis, self.groups)

    def evaluate(self) -> Tensor:
        least, most = _extremes(self.operand.evaluate().float(), self.axis, self.groups)
        steps = (most - least) / (self.high - self.low)
        steps = torch.where(steps > 0, steps, torch.ones_like(steps))
        return torch.round(self.low - least / steps).clamp_(self.low, self.high).to(torch.int32)

    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)

    def __str__(self) -> str:
        return f"zero_points({self.operand}, {_parameters_text(self)})"


@dataclass(frozen=True)
class Quantized(Expression):
    """``operand`` as integers: clamp(round(operand / scale) + zero_point, low, high).

    ``scale`` and ``zero_point`` (``None``: all 0) have the shape of :class:`Steps`. Stored as ``dtype``, whatever the
    number of bits.
    """

    operand: Expression
    scale: Expression
    zero_point: Expression | None
    axis: int
    low: int
    high: int
    dtype: torch.dtype = torch.int8

    def __post_init__(self) -> None:
        groups = self.scale.shape[1] if len(self.scale.shape) == 2 else 0
        if self.scale.shape != _parameter_shape(self.operand.shape, self.axis, groups):
            raise ValueError(
                f"a scale of shape {list(self.scale.shape)} does not fit a weight of shape {list(self.operand.shape)}"
            )

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.operand.shape

    @property
    def bits(self) -> int:
        """How many bits a value needs."""
        return (self.high - self.low).bit_length()

    def evaluate(self) -> Tensor:
        # int32 values are beyond what float32 counts in ones.
        wide = torch.float64 if self.dtype == torch.int32 else torch.float32
        scale = self.scale.evaluate().to(wide)
        value = _grouped(self.operand.evaluate().to(wide), scale.shape[1] if scale.ndim == 2 else 0)
        result = torch.round(value / _along(scale, self.axis, value))
        if self.zero_point is not None:
            result = result + _along(self.zero_point.evaluate(), self.axis, value)
        return result.clamp_(self.low, self.high).to(self.dtype).reshape(self.shape)

    def operands(self) -> tuple[Expression, ...]:
        return (self.operand, self.scale, *(() if self.zero_point is None else (self.zero_point,)))

    def __str__(self) -> str:
        zero = "" if self.zero_point is None else ", asymmetric"
        return f"quantized({self.operand}, axis={self.axis}, {self.low}…{self.high}{zero})"


def _parameter_shape(shape: Shape, axis: int, groups: int) -> Shape:
    if not groups:
        return (shape[axis],)
    if len(shape) != 2 or shape[1] % groups:
        raise ValueError(f"the rows of a weight of shape {list(shape)} cannot be cut into {groups} groups")
    return (shape[0], groups)


def _grouped(value: Tensor, groups: int) -> Tensor:
    return value.reshape(value.shape[0], groups, -1) if groups else value


def _extremes(value: Tensor, axis: int, groups: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each channel or group, 0 among them."""
    rows = _grouped(value, groups) if groups else value.movedim(axis, 0).reshape(value.shape[axis], -1)
    return rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)


def _along(parameter: Tensor, axis: int, value: Tensor) -> Tensor:
    """``parameter`` so that it broadcasts against ``value``, which is grouped where the parameter is."""
    if parameter.ndim == 2:
        return parameter.unsqueeze(-1)
    return parameter.reshape([-1 if dim == axis else 1 for dim in range(value.ndim)])


def _parameters_text(expression: Steps | ZeroPoints) -> str:
    groups = f", groups={expression.groups}" if expression.groups else ""
    return f"axis={expression.axis}, {expression.low}…{expression.high}{groups}"
