"""What it takes to evaluate lazy weights: bytes read from files and bytes held in memory. Nothing is evaluated."""

from __future__ import annotations

from collections.abc import Mapping

from optpass.ir.weights import Absent, Constant, Expression, Reshape


def read_bytes(weights: Mapping[str, Expression]) -> int:
    """Bytes of files that evaluating every one of ``weights`` once reads."""
    return sum(map(_read, weights.values()))


def file_leaves(weights: Mapping[str, Expression]) -> set[Expression]:
    """What of files ``weights`` are made from."""
    found: set[Expression] = set()
    pending = list(weights.values())
    while pending:
        expression = pending.pop()
        pending += expression.operands()
        if not expression.operands() and not isinstance(expression, (Absent, Constant)):
            found.add(expression)
    return found


def held_bytes(weights: Mapping[str, Expression]) -> int:
    """Anonymous bytes that the values of ``weights`` hold together.

    What is stored is a view of a mapped file, whose pages are the kernel's to drop; everything computed is held.
    """
    return sum(expression.nbytes for expression in weights.values() if not _is_mapped(expression))


def _read(expression: Expression) -> int:
    if isinstance(expression, Constant):
        return 0
    operands = expression.operands()
    return sum(map(_read, operands)) if operands else expression.nbytes


def _is_mapped(expression: Expression) -> bool:
    if isinstance(expression, Reshape):
        return _is_mapped(expression.operand)
    return not expression.operands()
