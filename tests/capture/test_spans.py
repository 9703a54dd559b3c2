from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpass.capture.spans import Span, as_written, example_size, size_from
from optpass.errors import UserError


@pytest.mark.parametrize(
    ("written", "size"),
    [(8, 8), ("8", 8), ("1..4", Span(1, 4)), ("64..515:8", Span(64, 512, 8)), ("4..4", 4), ("4..7:8", 4)],
)
def test_sizes_are_read(written: int | str, size: int | Span) -> None:
    assert size_from(written, "x") == size


@pytest.mark.parametrize("written", [0, -1, True, "", "0", "4..1", "0..3", "a..b", "1..", "1.5", "1...3", "1..4:", "²"])
def test_anything_else_is_refused_with_its_owner(written: int | str) -> None:
    with pytest.raises(UserError, match=r"^inputs: sample: "):
        size_from(written, "inputs: sample")


def test_written_as_read() -> None:
    assert as_written([2, Span(1, 4), Span(64, 512, 8)]) == [2, "1..4", "64..512:8"]


@given(
    low=st.integers(1, 300),
    width=st.integers(1, 300),
    step=st.sampled_from([0, 1, 2, 8]),
    default=st.integers(1, 600),
    taken=st.sets(st.integers(1, 600), max_size=3),
)
def test_examples_are_in_range_and_unlike_the_taken_ones(
    low: int, width: int, step: int, default: int, taken: set[int]
) -> None:
    span = size_from(f"{low}..{low + width}" + (f":{step}" if step else ""), "x")
    if isinstance(span, int):
        return
    found = example_size(span, default, taken)
    assert found in span
    free = [size for size in range(span.minimum, span.maximum + 1) if size in span and size > 1 and size not in taken]
    assert not free or (found > 1 and found not in taken)


def test_an_example_keeps_the_powers_of_two_of_the_default() -> None:
    taken: set[int] = set()
    height = example_size(Span(32, 128), 64, taken)
    width = example_size(Span(32, 128), 64, {height})
    assert (height, width) == (64, 128)
