"""Symbolic sizes in a file, checked before SymPy reads them: its parser is Python's ``eval``."""

from __future__ import annotations

import ast
import re

SYMBOL = re.compile(r"[a-z]{1,3}\d{1,9}", re.ASCII)
FUNCTIONS = frozenset(
    {"Add", "Mul", "Integer", "Symbol", "FloorDiv", "CleanDiv", "CeilDiv", "Mod", "PythonMod", "Max", "Min", "Pow"}
    | {"IntTrueDiv", "TruncToInt", "ToFloat", "ModularIndexing"}
)
ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative"})
LARGEST = 1 << 62
LARGEST_POWER = 8


def is_harmless(text: str) -> bool:
    """Whether ``text`` is arithmetic over symbols and whole numbers, as ``sympy.srepr`` writes it."""
    try:
        return _allowed(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _allowed(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=bool()):
            return False
        case ast.Constant(value=int() as value):
            return value < LARGEST
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return value < LARGEST
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords):
            assumed = all(key.arg in ASSUMPTIONS and isinstance(key.value, ast.Constant) for key in keywords)
            return assumed and SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id="Pow"), args=[base, exponent], keywords=[]):
            return _allowed(base) and _is_small(exponent)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return all(map(_allowed, arguments))
    return False


def _is_small(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant(value=int() as value)], keywords=[]):
            return 0 <= value <= LARGEST_POWER
    return False
