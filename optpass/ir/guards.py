"""Guards: comparisons of sizes that a captured graph rests on, as text that is checked before it is evaluated.

Guards travel in manifests, which are data: only exact arithmetic over names is ever evaluated.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from optpass.errors import UserError

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min}
DIGITS = 15


def identifier(name: str) -> str:
    """A dimension's name as a guard can hold it: ``image[2]`` → ``image_2``."""
    return re.sub(r"\W+", "_", name).strip("_")


class Guard:
    """One comparison, such as ``height*width % 16 == 0``.

    Raises:
        UserError: the text is anything else than comparisons of whole-number arithmetic over names.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
            self.names = frozenset(_names(self._tree))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"{text[:80]!r} is no comparison of sizes") from None

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true of ``sizes``; true too where a name has no size (the input is not there)."""
        if not self.names <= sizes.keys():
            return True
        try:
            return bool(_value(self._tree, sizes))
        except ZeroDivisionError:
            return False


def size_at(text: str, sizes: Mapping[str, int]) -> int:
    """A size that follows from others (``8*height``, ``image[2]*image[3]/4``), at ``sizes``.

    Raises:
        UserError: the text is no arithmetic over names, or its value no whole number.
    """
    if text in sizes:
        return sizes[text]
    plain = text
    for name in sorted(sizes, key=len, reverse=True):
        plain = plain.replace(name, identifier(name))
    value = _value(Guard(plain)._tree, {identifier(name): size for name, size in sizes.items()})
    if value != int(value):
        raise UserError(f"a size of {text} is {value}: no whole number")
    return int(value)


def _names(node: ast.AST) -> list[str]:
    """Every name in an allowed tree.

    Raises:
        ValueError: something in it is not allowed.
    """
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Constant(value=int() as value) if abs(value) < 10**DIGITS:
            return []
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _names(left) + _names(right)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            return _names(operand)
        case ast.BoolOp(values=values):
            return [name for value in values for name in _names(value)]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in COMPARISONS for op in ops):
            return [name for item in (left, *others) for name in _names(item)]
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in FUNCTIONS:
            return [name for argument in arguments for name in _names(argument)]
    raise ValueError(f"{type(node).__name__} in a guard")


def _value(node: ast.AST, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Name(id=name):
            return sizes[name]
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=op, right=right):
            return BINARY[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.UnaryOp(operand=operand):
            return not _value(operand, sizes)
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(_value(value, sizes) for value in values)
        case ast.Compare(left=left, ops=ops, comparators=others):
            items = [_value(item, sizes) for item in (left, *others)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, items, items[1:], strict=False))
        case ast.Call(func=ast.Name(id=function), args=arguments):
            return FUNCTIONS[function](*(_value(argument, sizes) for argument in arguments))
    raise AssertionError(f"{type(node).__name__} passed the check")
