from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from optpass.interchange.expressions import is_harmless

S, T = sympy.symbols("s0 u12", integer=True, positive=True)


@pytest.mark.parametrize("size", [S, 2 * S, S * T - 1, FloorDiv(S - 1, 2) + 1, Mod(S * T, 8), S**2, sympy.Max(S, T)])
def test_what_sympy_writes_of_sizes_is_harmless(size: sympy.Expr) -> None:
    assert is_harmless(sympy.srepr(size))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "Symbol('s0').__class__",
        "Symbol('__import__')",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Integer(9), Integer(999999999))",
        "Lambda(Symbol('s0'), Integer(1))",
        "exec('1')",
        "s0",
        "Integer(1) if True else Integer(2)",
        "",
        "Mul(Integer(2), *[Symbol('s0')])",
    ],
)
def test_anything_else_is_not(text: str) -> None:
    assert not is_harmless(text)
