"""Expressions in a file: what a tensor with slots is made of, so that it can be made again.

Only what stands between the tensor and its slots is written out; whatever has no slot below it is a leaf,
whose values are stored beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from optpass.errors import UserError
from optpass.ir.algebra import Einsum, Eye, Full, Pad, Power, Update
from optpass.ir.decompositions import Adaptors, Factors
from optpass.ir.slots import Slot, has_slot
from optpass.ir.weights import (
    Cast,
    Concat,
    Expression,
    Permute,
    Product,
    Reshape,
    Scale,
    Select,
    Sum,
    dtype_from_name,
    dtype_name,
)

CLASSES: dict[str, type[Expression]] = {
    kind.__name__.lower(): kind
    for kind in (
        *(Adaptors, Cast, Concat, Einsum, Eye, Factors, Full, Pad, Permute, Power, Product, Reshape, Scale, Select),
        *(Sum, Update),
    )
}
MADE_FROM_NOTHING = (Eye, Full)
KIND = "is"
DEEPEST = 200


def encode(expression: Expression, leaf: Callable[[Expression], str]) -> dict[str, Any]:
    """``expression`` as JSON; ``leaf`` stores one without slots and gives the key that it is found by.

    Raises:
        TypeError: an expression above a slot is of a kind that has no form in files.
    """
    if isinstance(expression, Slot):
        return {
            KIND: "slot",
            "name": expression.name,
            "role": expression.role,
            "base": encode(expression.base, leaf),
        }
    if not has_slot(expression) and not isinstance(expression, MADE_FROM_NOTHING):
        return {KIND: "stored", "key": leaf(expression)}
    kind = type(expression).__name__.lower()
    if CLASSES.get(kind) is not type(expression):
        raise TypeError(f"{type(expression).__name__} has no form in files, and a slot lies below it")
    items = {item.name: getattr(expression, item.name) for item in fields(expression) if item.init}  # type: ignore[arg-type]
    return {KIND: kind, **{name: _encode_value(value, leaf) for name, value in items.items()}}


def _encode_value(value: Any, leaf: Callable[[Expression], str]) -> Any:
    if isinstance(value, Expression):
        return encode(value, leaf)
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    return [_encode_value(item, leaf) for item in value] if isinstance(value, tuple) else value


def decode(
    record: Any, leaf: Callable[[str], Expression], fill: Callable[[str, str, Expression], Expression], depth: int = 0
) -> Expression:
    """The expression of a record: ``leaf`` gives what :func:`encode` stored, ``fill`` what a slot holds.

    ``fill`` is called with the slot's name, its role, and what stands there without content.

    Raises:
        UserError: the record is damaged.
    """
    try:
        kind, rest = record[KIND], {key: value for key, value in record.items() if key != KIND}
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        if kind == "stored":
            return leaf(str(rest["key"]))
        if kind == "slot":
            return fill(str(rest["name"]), str(rest["role"]), decode(rest["base"], leaf, fill, depth + 1))
        return CLASSES[kind](**{key: _decode_value(value, leaf, fill, depth) for key, value in rest.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the record of an exchangeable weight is damaged: {error}") from error


def _decode_value(
    value: Any, leaf: Callable[[str], Expression], fill: Callable[[str, str, Expression], Expression], depth: int
) -> Any:
    if isinstance(value, Mapping):
        return (
            dtype_from_name(str(value["dtype"]))
            if "dtype" in value and KIND not in value
            else decode(value, leaf, fill, depth + 1)
        )
    if isinstance(value, list):
        return tuple(_decode_value(item, leaf, fill, depth) for item in value)
    return value
