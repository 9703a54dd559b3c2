"""Families of ATen operators that analyses and rewrites ask about."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

POINTWISE_UNARY = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.mish.default,
        aten.softplus.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.exp.default,
        aten.log.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.sin.default,
        aten.cos.default,
        aten.neg.default,
        aten.abs.default,
        aten.clamp.default,
        aten.pow.Tensor_Scalar,
        aten.rsub.Scalar,
        aten.to.dtype,
    }
)
"""One tensor in, one of the same shape out, element by element."""

POINTWISE_BINARY = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
    }
)
"""Arithmetic of two operands that broadcast; the second may be a number."""

MASKING = frozenset(
    {
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    }
)
"""Pointwise choice between values."""

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
"""Softmax over the dimension that is their second argument."""

FUSED_ATTENTION = frozenset(
    {
        aten.scaled_dot_product_attention.default,
        aten._scaled_dot_product_attention_math.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)
"""softmax(q·kᵀ)·v in one operator: the one that models call, and the kernels that a lower level names."""

MATMULS = frozenset(
    {
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.einsum.default,
    }
)
"""Products of two activations (or of an activation and a weight) that are not ``linear`` or a convolution."""


CONVOLUTIONS = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    }
)
"""Convolutions as models call them; ``padding`` is given in numbers, or as ``same`` or ``valid``."""

TRANSPOSED_CONVOLUTIONS = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)
"""Their transposes, whose weights are [in, out / groups, *kernel]."""


def is_view(node: Node) -> bool:
    """Whether the result shares its first operand's storage: what the schema says, casts excepted.

    ``reshape`` counts as a view although it copies after some transpositions: engines choose layouts
    themselves. ``chunk``, ``split`` and the ``getitem`` of their results are views too.
    """
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is aten.to.dtype:
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def argument(node: Node, name: str) -> Any:
    """The value of ``node``'s argument called ``name`` in the operator's schema, given or default.

    Raises:
        KeyError: the operator has no such argument.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for index, item in enumerate(schema.arguments):
        if item.name == name:
            positional = index < len(node.args) and not item.kwarg_only
            return node.args[index] if positional else item.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")
