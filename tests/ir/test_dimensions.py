from __future__ import annotations

import pytest

from optpass.errors import UserError
from optpass.ir.dimensions import FIXED, Dimension, Dimensions

BATCH = Dimension("batch", 1, 4, example=2)
HEIGHT = Dimension("height", 9, 65, step=8, example=17)
DIMENSIONS = Dimensions((BATCH, HEIGHT), ("batch*height <= 200",))


def test_membership_follows_range_and_step() -> None:
    assert [size for size in range(80) if size in HEIGHT] == [9, 17, 25, 33, 41, 49, 57, 65]
    assert HEIGHT.offset == 1
    assert HEIGHT.samples() == [9, 17, 33, 57, 65]
    assert str(HEIGHT) == "9..65 in steps of 8"


def test_resolve_names_what_the_call_chose() -> None:
    shapes = [("image", ("batch", 3, "height"), (2, 3, 33)), ("label", ("batch",), (2,))]
    assert DIMENSIONS.resolve(shapes) == {"batch": 2, "height": 33}


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ((2, 3, 33), (3,), r"inputs image\[0\] and label\[0\] disagree on batch: 2 and 3"),
        ((5, 3, 33), (5,), r"input image\[0\]: batch is 5, and the engine was built for 1..4"),
        ((2, 3, 34), (2,), r"input image\[2\]: height is 34, and the engine was built for 9..65 in steps of 8"),
        ((4, 3, 65), (4,), r"cannot take batch=4, height=65: the model needs batch\*height <= 200"),
    ],
)
def test_resolve_refuses_by_name(image: tuple[int, ...], label: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DIMENSIONS.resolve([("image", ("batch", 3, "height"), image), ("label", ("batch",), label)])


def test_alternatives_are_the_ends_that_no_guard_refuses() -> None:
    assert DIMENSIONS.alternatives() == [{"batch": 1, "height": 9}]
    assert Dimensions((BATCH, HEIGHT)).alternatives()[1] == {"batch": 4, "height": 65}
    assert FIXED.alternatives() == []


def test_guards_know_dimensions_that_are_named_by_their_place() -> None:
    place = Dimensions((Dimension("image[2]", 1, 9, example=2),), ("image_2 <= 4",))
    with pytest.raises(UserError, match="the model needs image_2 <= 4"):
        place.resolve([("image", (1, 1, "image[2]"), (1, 1, 5))])


def test_json_round_trip_and_damage() -> None:
    assert Dimensions.from_json(DIMENSIONS.as_json()) == DIMENSIONS
    with pytest.raises(UserError, match="no comparison of sizes"):
        Dimensions.from_json({"items": [], "guards": ["open('x')"]})
