"""Multiply-accumulates of one node, from shapes alone: a table by operator that an author can extend.

Convention: one MAC for each product that a matrix product, a convolution or an attention sums up.
Biases, normalisations, activations and other elementwise work count nothing, and neither does
padding count less. FLOPs are 2·MAC. Open dimensions count at the sizes that they were captured with.
An operator that has no rule here and is not known to be free (:mod:`optpass.analysis.free_operators`)
counts nothing too, and the costs say so by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Node

from optpass.analysis.free_operators import is_free
from optpass.analysis.operators import CONVOLUTIONS, FUSED_ATTENTION, TRANSPOSED_CONVOLUTIONS, argument, aten
from optpass.ir.graph import example_shape as shape_of

Rule = Callable[[Node], int]
Function = TypeVar("Function", bound=Rule)
RULES: dict[Any, Rule] = {}
"""Operator → its rule; operators without one count nothing."""


def mac_rule(*operators: Any) -> Callable[[Function], Function]:
    """Register a function ``node → MACs`` for ``operators``; the last one registered holds.

    A rule reads shapes from ``node.meta["val"]`` and its operands', never values.
    """

    def register(rule: Function) -> Function:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def macs_of(node: Node) -> int:
    """Multiply-accumulates of ``node``; 0 where no rule is registered."""
    rule = RULES.get(node.target)
    return rule(node) if rule else 0


def is_counted(node: Node) -> bool:
    """Whether :func:`macs_of` is right about ``node``: it has a rule, or is known to have no products."""
    return node.target in RULES or is_free(node)


def _operand_shape(node: Node, name: str) -> tuple[int, ...]:
    return shape_of(argument(node, name))


@mac_rule(aten.linear.default)
def linear(node: Node) -> int:
    """Results times input features."""
    return math.prod(shape_of(node)) * _operand_shape(node, "weight")[-1]


@mac_rule(
    aten.matmul.default,
    aten.linalg_matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.vdot.default,
    aten.inner.default,
    aten._int_mm.default,
    aten._scaled_mm.default,
)
def matmul(node: Node) -> int:
    """Results times the contracted size, whatever is batched or broadcast."""
    left: Any = node.args[0]
    return math.prod(shape_of(node)) * shape_of(left)[-1]


@mac_rule(aten.linalg_vecdot.default)
def vector_products(node: Node) -> int:
    """Results times the contracted size, after broadcasting."""
    dim = argument(node, "dim")
    contracted: int = max(_operand_shape(node, "x")[dim], _operand_shape(node, "y")[dim])
    return math.prod(shape_of(node)) * contracted


@mac_rule(aten.tensordot.default)
def tensordot(node: Node) -> int:
    """Results times the contracted sizes."""
    sizes = _operand_shape(node, "self")
    contracted: list[int] = [sizes[dim] for dim in argument(node, "dims_self")]
    return math.prod(shape_of(node)) * math.prod(contracted)


@mac_rule(aten.addmv.default)
def addmv(node: Node) -> int:
    """As the product of the matrix and the vector inside it."""
    return math.prod(_operand_shape(node, "mat"))


@mac_rule(aten.addbmm.default)
def addbmm(node: Node) -> int:
    """As the batched product inside it, whose batch is summed."""
    batch, rows, inner = _operand_shape(node, "batch1")
    return batch * rows * inner * _operand_shape(node, "batch2")[-1]


@mac_rule(aten.bilinear.default)
def bilinear(node: Node) -> int:
    """x₁ᵀ·W·x₂ for every output feature: one product for each pair of features, one for their sum with x₂."""
    first, second = _operand_shape(node, "weight")[1:]
    return math.prod(shape_of(node)) * second * (first + 1)


@mac_rule(aten.addmm.default, aten._addmm_activation.default)
def addmm(node: Node) -> int:
    """As the matrix product inside it."""
    return math.prod(shape_of(node)) * _operand_shape(node, "mat1")[-1]


@mac_rule(aten.baddbmm.default)
def baddbmm(node: Node) -> int:
    """As the batched matrix product inside it."""
    return math.prod(shape_of(node)) * _operand_shape(node, "batch1")[-1]


@mac_rule(
    *CONVOLUTIONS,
    aten._convolution_mode.default,
    aten._conv_depthwise2d.default,
    aten.conv_depthwise3d.default,
    aten.mkldnn_convolution.default,
)
def convolution(node: Node) -> int:
    """Results times (input channels of a group × kernel size): a weight is [out, in / groups, *kernel]."""
    return math.prod(shape_of(node)) * math.prod(_operand_shape(node, "weight")[1:])


@mac_rule(*TRANSPOSED_CONVOLUTIONS)
def transposed_convolution(node: Node) -> int:
    """Inputs times (output channels of a group × kernel size): a weight is [in, out / groups, *kernel]."""
    return math.prod(_operand_shape(node, "input")) * math.prod(_operand_shape(node, "weight")[1:])


@mac_rule(aten.convolution.default, aten.convolution_overrideable.default, aten._convolution.default)
def any_convolution(node: Node) -> int:
    """Either of the two above, by its ``transposed`` argument."""
    return transposed_convolution(node) if argument(node, "transposed") else convolution(node)


@mac_rule(*FUSED_ATTENTION)
def attention(node: Node) -> int:
    """QKᵀ and AV: batch × heads × queries × keys × (key features + value features). Masks save nothing."""
    *batch, queries, _ = _operand_shape(node, "query")
    *other, keys, key_features = _operand_shape(node, "key")
    value_features = _operand_shape(node, "value")[-1]
    # Heads that share keys (enable_gqa) are fewer on the keys' side, and broadcast batches are 1 on either.
    wide = (max(a, b) for a, b in zip(batch, other, strict=True))
    return math.prod(wide) * queries * keys * (key_features + value_features)


@mac_rule(aten._native_multi_head_attention.default)
def multi_head_attention(node: Node) -> int:
    """Its projections; the attention inside is :func:`attention_inside`."""
    batch, queries, width = _operand_shape(node, "query")
    keys = _operand_shape(node, "key")[1]
    return 2 * batch * (queries + keys) * width * width + attention_inside(node)


@mac_rule(aten._transformer_encoder_layer_fwd.default)
def encoder_layer(node: Node) -> int:
    """Its projections and its two linears; the attention inside is :func:`attention_inside`."""
    batch, tokens, width = _operand_shape(node, "src")
    hidden = _operand_shape(node, "ffn_weight_1")[0]
    return batch * tokens * width * (4 * width + 2 * hidden) + attention_inside(node)


def attention_inside(node: Node) -> int:
    """QKᵀ and AV of an operator that holds more than an attention; 0 of any other."""
    if node.target is aten._native_multi_head_attention.default:
        batch, queries, width = _operand_shape(node, "query")
        return 2 * batch * queries * _operand_shape(node, "key")[1] * width
    if node.target is aten._transformer_encoder_layer_fwd.default:
        batch, tokens, width = _operand_shape(node, "src")
        return 2 * batch * tokens * tokens * width
    return 0


@mac_rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(node: Node) -> int:
    """Every weight matrix once for each step and clip: input, hidden and (LSTM) projection products."""
    steps = math.prod(_operand_shape(node, "input")[:-1])
    shapes = [shape_of(parameter) for parameter in argument(node, "params")]
    return steps * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


@mac_rule(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def recurrent_cell(node: Node) -> int:
    """One step: both weight matrices once for each row."""
    rows = math.prod(_operand_shape(node, "input")[:-1])
    return rows * sum(math.prod(_operand_shape(node, name)) for name in ("w_ih", "w_hh"))


@mac_rule(aten.einsum.default)
def einsum(node: Node) -> int:
    """Operands contracted from left to right, each product over the sizes of all its indices."""
    indices, products = contractions(node)
    operands: Any = node.args[1]
    sizes: dict[str, int] = {}
    for names, operand in zip(indices, operands, strict=True):
        for name, size in zip(names, shape_of(operand), strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return sum(math.prod(sizes[name] for name in product) for product in products)


def contractions(node: Node) -> tuple[list[list[str]], list[set[str]]]:
    """Of an einsum, the index of each dimension of each operand, and the indices of each product from left to right."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    terms, _, result = equation.partition("->")
    ranks = [len(shape_of(operand)) for operand in operands]  # type: ignore[union-attr, arg-type]
    indices = [_indices(term, rank) for term, rank in zip(terms.split(","), ranks, strict=True)]
    if "->" in equation:
        kept = set(_indices(result, len(shape_of(node))))
    else:
        flat = [name for names in indices for name in names]
        kept = {name for name in flat if flat.count(name) == 1 or name.startswith(".")}
    products, current = [], set(indices[0])
    for position, names in enumerate(indices[1:], start=1):
        joined = current | set(names)
        products.append(joined)
        current = joined & (kept | {name for later in indices[position + 1 :] for name in later})
    return indices, products


def _indices(term: str, rank: int) -> list[str]:
    """One name per dimension; those under ``...`` are numbered from the right: ``.2 .1``."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]
