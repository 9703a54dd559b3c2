"""Rules of arithmetic: what an operator with a neutral operand, or two that undo each other, come to.

Bit for bit, NaN and infinity included, with two exceptions: the sign of a zero may change (``-0.0 + 0`` is
``0.0``), and where scalars are merged, what left the range on the way no longer does. ``x · 0`` is not among
them, nor any sum or product that would be rounded once instead of twice: a frequency that is off by its last
bit turns a time embedding of step 999 by 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.analysis.uniform import uniform_value
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.ir.weights import WeightStore, dtype_name
from optpass.rewrite.pattern import Match
from optpass.rewrite.rules import Rule, layout

NEUTRAL = {
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.pow.Tensor_Scalar: 1,
}
"""What leaves the first operand as it is."""
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})
SIGNIFICAND = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
"""Bits of a whole number that a float holds."""


def _binary(operator: Any) -> Callable[[Any, Any], Any]:
    return lambda x, y: operator(x, y)


class NeutralOperand(Rule):
    """x + 0, x − 0, x · 1, x / 1, x¹ → x, where the neutral operand is a number or a tensor of one value.

    Declines where it converts ``x`` or repeats it: then it is a cast or an expand.
    """

    def __init__(self, weights: WeightStore) -> None:
        self.weights = weights

    def pattern(self, x: Any, y: Any) -> Any:
        return aten.add.Tensor(x, y)

    def patterns(self) -> Sequence[Callable[..., Any]]:
        return tuple(map(_binary, NEUTRAL))

    def concerns(self, match: Match) -> bool:
        return self._kept(match) is not None

    def check(self, match: Match) -> str | None:
        if layout(self.rewrite(match.graph, match)) == layout(match.root):
            return None
        return "the neutral operand converts or repeats the other"

    def rewrite(self, graph: Graph, match: Match) -> Node:
        kept = self._kept(match)
        assert kept is not None
        return kept

    def _kept(self, match: Match) -> Node | None:
        x, y, target = match["x"], match["y"], match.root.target
        if isinstance(x, Node) and self._is_neutral(y, target):
            return x
        swapped = target in COMMUTATIVE and isinstance(y, Node) and self._is_neutral(x, target)
        return y if swapped else None

    def _is_neutral(self, operand: Any, target: Any) -> bool:
        value = uniform_value(operand, self.weights)
        return value is not None and not isinstance(value, bool) and value == NEUTRAL[target]


class DoubleNegation(Rule):
    """−(−x) → x."""

    def pattern(self, x: Any) -> Any:
        return aten.neg.default(aten.neg.default(x))

    def rewrite(self, graph: Graph, match: Match) -> Node:
        x: Node = match["x"]
        return x


class CastChain(Rule):
    """x.to(wide).to(dtype) → x.to(dtype), where ``wide`` holds every value of x's dtype; x itself if it has ``dtype``.

    A cast that rounds stays: rounding twice is not rounding once.
    """

    def pattern(self, x: Any, wide: Any, dtype: Any) -> Any:
        return aten.to.dtype(aten.to.dtype(x, wide), dtype)

    def concerns(self, match: Match) -> bool:
        return holds(match["wide"], value_of(match["x"]).dtype)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        x: Node = match["x"]
        if value_of(x).dtype == match["dtype"]:
            return x
        return graph.call(aten.to.dtype, x, match["dtype"], like=match.root)


def holds(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether every value of ``dtype`` is one of ``wide`` too."""
    if dtype == torch.bool:
        return True
    if not dtype.is_floating_point and wide in SIGNIFICAND:
        return not dtype.is_complex and torch.iinfo(dtype).max.bit_length() <= SIGNIFICAND[wide]
    return wide != torch.bool and torch.promote_types(dtype, wide) == wide


class _ScalarChain(Rule):
    """``outer(inner(x, a), b)`` with two numbers, nobody else reading the inner one → one operator with one number."""

    operators: tuple[Any, Any]

    def pattern(self, x: Any, a: Any, b: Any) -> Any:
        return self.operators[0](self.operators[0](x, a), b)

    def patterns(self) -> Sequence[Callable[..., Any]]:
        return [_chain(inner, outer) for inner in self.operators for outer in self.operators]

    def concerns(self, match: Match) -> bool:
        inner = match.root.args[0]
        return (
            all(isinstance(match[name], (int, float)) and not isinstance(match[name], bool) for name in "ab")
            and isinstance(inner, Node)
            and len(inner.users) == 1
            and layout(match["x"]) == layout(inner) == layout(match.root)
        )


def _chain(inner: Any, outer: Any) -> Callable[[Any, Any, Any], Any]:
    return lambda x, a, b: outer(inner(x, a), b)


def _inner(match: Match) -> Any:
    node: Any = match.root.args[0]
    return node.target


class ScalarProducts(_ScalarChain):
    """(x · a) · b → x · (a·b), and with quotients, where a or b is a power of two: nothing is rounded differently."""

    operators = (aten.mul.Tensor, aten.div.Tensor)

    def concerns(self, match: Match) -> bool:
        return super().concerns(match) and value_of(match["x"]).dtype.is_floating_point

    def check(self, match: Match) -> str | None:
        a, b, dtype = match["a"], match["b"], value_of(match["x"]).dtype
        if not _is_power_of_two(a) and not _is_power_of_two(b):
            return f"the product with {a} is rounded before {b}: one product would be rounded once"
        factor, limits = self._factor(match), torch.finfo(dtype)
        if factor is None or not limits.smallest_normal <= abs(factor) <= limits.max:
            return f"{a} and {b} come to what {dtype_name(dtype)} does not hold"
        return None

    def rewrite(self, graph: Graph, match: Match) -> Node:
        divided = _inner(match) is match.root.target is aten.div.Tensor
        operator = aten.div.Tensor if divided else aten.mul.Tensor
        return graph.call(operator, match["x"], self._factor(match), like=match.root)

    def _factor(self, match: Match) -> float | None:
        a, b = match["a"], match["b"]
        try:
            if _inner(match) is match.root.target:
                return float(a * b)
            return float(a / b if match.root.target is aten.div.Tensor else b / a)
        except (ZeroDivisionError, OverflowError):
            return None


def _is_power_of_two(number: float) -> bool:
    return math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5


class ScalarSums(_ScalarChain):
    """(x + a) + b → x + (a+b), and with differences, for whole numbers; sums of floats round at every step."""

    operators = (aten.add.Tensor, aten.sub.Tensor)

    def concerns(self, match: Match) -> bool:
        dtype = value_of(match["x"]).dtype
        return super().concerns(match) and not dtype.is_floating_point and not dtype.is_complex

    def rewrite(self, graph: Graph, match: Match) -> Node:
        signs = [-1 if target is aten.sub.Tensor else 1 for target in (_inner(match), match.root.target)]
        total = signs[0] * match["a"] + signs[1] * match["b"]
        return graph.call(aten.add.Tensor, match["x"], total, like=match.root)


class IdleMask(Rule):
    """Attention under a mask that hides nothing (True, or 0, everywhere) → attention without a mask."""

    def __init__(self, weights: WeightStore) -> None:
        self.weights = weights

    def pattern(self, q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, gqa: Any) -> Any:
        return aten.scaled_dot_product_attention.default(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)

    def concerns(self, match: Match) -> bool:
        mask = match["mask"]
        if not isinstance(mask, Node):
            return False
        value = uniform_value(mask, self.weights)
        if shape_of(match.root) != (*shape_of(match["q"])[:-1], shape_of(match["v"])[-1]):
            return False
        return value is True if value_of(mask).dtype == torch.bool else value == 0

    def rewrite(self, graph: Graph, match: Match) -> Node:
        root = match.root
        operands = (match["q"], match["k"], match["v"], None, match["dropout"], match["causal"])
        optional: dict[str, Any] = {name: argument(root, name) for name in ("scale", "enable_gqa")}
        given = {name: value for name, value in optional.items() if value not in (None, False)}
        trimmed = operands if match["dropout"] or match["causal"] else operands[:3]
        return graph.call(root.target, *trimmed, like=root, **given)


def arithmetic_rules(weights: WeightStore) -> tuple[Rule, ...]:
    """All rules of this file."""
    return (
        NeutralOperand(weights),
        DoubleNegation(),
        CastChain(),
        ScalarProducts(),
        ScalarSums(),
        IdleMask(weights),
    )
