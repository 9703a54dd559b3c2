from __future__ import annotations

import pytest

from optpass.errors import UserError
from optpass.ir.guards import Guard, size_at


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        ("height % 8 == 0", {"height": 64}, True),
        ("height % 8 == 0", {"height": 65}, False),
        ("height*width <= 4096", {"height": 64, "width": 65}, False),
        ("1 < batch < 64", {"batch": 64}, False),
        ("2 + 2*((-1 + height)//2) == height and not width == 3", {"height": 6, "width": 4}, True),
        ("max(height, width) >= 10", {"height": 3, "width": 10}, True),
        ("height % width == 1", {"height": 3, "width": 0}, False),
        ("tokens == 7", {"height": 3}, True),
    ],
)
def test_holds(text: str, sizes: dict[str, int], expected: bool) -> None:
    assert Guard(text).holds(sizes) is expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "height.bit_length() == 3",
        "9**9**9 == height",
        "(lambda: 1)() == 1",
        "[x for x in height]",
        "height == 'a'",
        f"height == {10**30}",
        "height ==",
        "eval(height)",
        "(" * 5000 + "height" + ")" * 5000,
    ],
)
def test_refuses_anything_but_arithmetic(text: str) -> None:
    with pytest.raises(UserError, match="no comparison of sizes"):
        Guard(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("height", 6), ("8*height", 48), ("batch*height*width/4", 30), ("image[2]*image[3]/2", 77), ("1 + width//2", 6)],
)
def test_a_size_that_follows(text: str, expected: int) -> None:
    sizes = {"batch": 2, "height": 6, "width": 10, "image[2]": 14, "image[3]": 11}
    assert size_at(text, sizes) == expected


@pytest.mark.parametrize("text", ["height/4", "eval(height)", "height**9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"no whole number|no comparison of sizes"):
        size_at(text, {"height": 6})
