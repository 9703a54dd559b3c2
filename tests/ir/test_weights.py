"""Lazy-weight expressions against eager torch, nested at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from optpass.errors import MissingValuesError, WeightError
from optpass.ir.safetensors_io import read_safetensors, write_safetensors
from optpass.ir.weights import (
    DTYPE_NAMES,
    Absent,
    Cast,
    Concat,
    Constant,
    Expression,
    Permute,
    Product,
    Reshape,
    Scale,
    Select,
    Sum,
    WeightStore,
    dtype_from_name,
    dtype_name,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Pair = tuple[Expression, Tensor]


def wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def leaf(draw: st.DrawFn) -> Pair:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    value = torch.randn(shape, generator=generator).to(draw(st.sampled_from(FLOATS)))
    return Constant(value), value


def cast(draw: st.DrawFn, pair: Pair) -> Pair:
    dtype = draw(st.sampled_from(FLOATS))
    return Cast(pair[0], dtype), pair[1].to(dtype)


def select(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    dim = draw(st.integers(-value.dim(), value.dim() - 1))
    indices = draw(st.lists(st.integers(0, value.shape[dim] - 1), min_size=1, max_size=5))
    return Select(expression, dim, tuple(indices)), value.index_select(dim, torch.tensor(indices))


def concat(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    dim = draw(st.integers(-value.dim(), value.dim() - 1))
    count = draw(st.integers(1, 3))
    return Concat((expression,) * count, dim), torch.cat([value] * count, dim)


def reshape(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    shape = draw(st.sampled_from([(value.numel(),), (1, value.numel()), (value.numel(), 1), tuple(value.shape)]))
    return Reshape(expression, shape), value.reshape(shape)


def permute(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    dims = tuple(draw(st.permutations(range(value.dim()))))
    return Permute(expression, dims), value.permute(dims)


def scale(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    factor = draw(st.floats(-2, 2))
    return Scale(expression, factor), (wide(value) * factor).to(value.dtype)


def add(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    other = Cast(Scale(expression, 0.5), draw(st.sampled_from(FLOATS)))
    return Sum(expression, other), (wide(value) + other.evaluate().to(wide(value).dtype)).to(value.dtype)


def product(draw: st.DrawFn, pair: Pair) -> Pair:
    expression, value = pair
    rows = value.shape[0]
    matrix, values = Reshape(expression, (rows, value.numel() // rows)), value.reshape(rows, -1)
    return Product(matrix, Permute(matrix, (1, 0))), (wide(values) @ wide(values).T).to(value.dtype)


STEPS: list[Callable[[st.DrawFn, Pair], Pair]] = [cast, select, concat, reshape, permute, scale, add, product]


@st.composite
def expressions(draw: st.DrawFn) -> Pair:
    """An expression nested up to five deep, and the same computed eagerly."""
    pair = leaf(draw)
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=5)):
        if pair[1].numel() < 2000:
            pair = step(draw, pair)
    return pair


@settings(max_examples=300, deadline=None)
@given(expressions())
def test_an_expression_gives_what_torch_gives_eagerly(pair: Pair) -> None:
    expression, expected = pair
    found = expression.evaluate()
    assert found.dtype == expression.dtype == expected.dtype
    assert tuple(found.shape) == expression.shape == tuple(expected.shape)
    assert torch.equal(found, expected) or torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_shape_and_size_are_known_without_evaluation(pair: Pair) -> None:
    expression, expected = pair
    assert expression.numel == expected.numel()
    assert expression.nbytes == expected.numel() * expected.element_size()
    assert expression.has_values
    assert str(expression)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abc.", min_size=1, max_size=6), expressions(), min_size=1, max_size=4))
def test_nested_expressions_stream_to_a_file_that_the_library_reads(tmp_path: Path, found: dict[str, Pair]) -> None:
    weights = {name: expression for name, (expression, _) in found.items()}
    write_safetensors(weights, tmp_path / "x.safetensors", allow_nonfinite=True)
    back = load_file(tmp_path / "x.safetensors")
    again = read_safetensors(tmp_path / "x.safetensors")
    for name, expression in weights.items():
        torch.testing.assert_close(back[name], expression.evaluate(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(again[name].evaluate(), back[name], rtol=0, atol=0, equal_nan=True)


def test_a_low_rank_update_is_rounded_once() -> None:
    weight = torch.randn(16, 8).half()
    up, down = torch.randn(16, 4).half(), torch.randn(4, 8).half()
    delta = Scale(Product(Cast(Constant(up), torch.float32), Cast(Constant(down), torch.float32)), 0.25)
    merged = Sum(Constant(weight), delta)
    assert torch.equal(merged.evaluate(), (weight.float() + up.float() @ down.float() * 0.25).half())


A = Constant(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Select(A, 1, (3,)), "outside dimension 1 of size 3"),
        (lambda: Select(A, 1, (-1,)), "outside dimension 1 of size 3"),
        (lambda: Select(A, 2, (0,)), r"no dimension 2 in \[2, 3\]"),
        (lambda: Concat((A, Constant(torch.zeros(2, 4))), 0), r"cannot concatenate f32\[2, 4\] to f32\[2, 3\] along 0"),
        (lambda: Concat((A, Constant(torch.zeros(2))), 0), r"cannot concatenate f32\[2\]"),
        (lambda: Concat((A, Cast(A, torch.float16)), 0), r"cannot concatenate f16\[2, 3\]"),
        (lambda: Concat((A,), 2), "no dimension 2"),
        (lambda: Concat((), 0), "nothing to concatenate"),
        (lambda: Reshape(A, (5,)), r"cannot reshape \(2, 3\)"),
        (lambda: Reshape(A, (-2, -3)), r"cannot reshape \(2, 3\)"),
        (lambda: Permute(A, (0,)), "is not an order of 2 dimensions"),
        (lambda: Permute(A, (0, 0)), "is not an order of 2 dimensions"),
        (lambda: Sum(A, Constant(torch.zeros(3, 2))), "cannot add"),
        (lambda: Product(A, A), "cannot multiply matrices"),
        (lambda: Product(A, Constant(torch.zeros(3))), "cannot multiply matrices"),
    ],
)
def test_operands_that_do_not_fit_are_refused_when_built(build: Callable[[], Expression], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_an_absent_weight_refuses_through_any_expression() -> None:
    absent = Absent("conv.weight", (2, 2), torch.float32)
    expression = Sum(Scale(absent, 2.0), Constant(torch.zeros(2, 2)))
    assert not expression.has_values
    with pytest.raises(MissingValuesError, match=r"'conv\.weight' has no values"):
        expression.evaluate()


def test_a_store_is_a_value() -> None:
    store = WeightStore({"a": A, "b": A})
    changed = store.updated({"a": Scale(A, 2.0)})
    assert store["a"] is A
    assert isinstance(changed["a"], Scale)
    assert list(store.restricted(["b"])) == ["b"]
    assert store.nbytes == 2 * 24


def test_an_unknown_weight_is_named_with_the_nearest() -> None:
    with pytest.raises(WeightError, match=r"no weight named 'conv\.wieght'; did you mean 'conv\.weight'"):
        WeightStore({"conv.weight": A})["conv.wieght"]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_dtype_names_round_trip(dtype: torch.dtype) -> None:
    assert dtype_from_name(dtype_name(dtype)) == dtype


def test_an_unknown_dtype_name_is_refused() -> None:
    with pytest.raises(WeightError, match="unknown dtype 'f31'"):
        dtype_from_name("f31")


def test_a_constant_keeps_its_values_when_the_source_is_strided() -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(Constant(value).evaluate(), value)
    assert Constant(value).evaluate().is_contiguous()
