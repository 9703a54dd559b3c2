"""Numbers in words."""

from __future__ import annotations

import math

import pytest

from optpass.report import units


@pytest.mark.parametrize(
    ("unit", "value", "words"),
    [
        (units.parameters, 1_524_623_082, "1,524.62 M"),
        (units.parameters, 4_902_308, "4.90 M"),
        (units.parameters, 312_576, "312.6 k"),
        (units.parameters, 912, "912"),
        (units.parameters, 11.9e9, "11.90 B"),
        (units.macs, 401.72e9, "401.7 GMAC"),
        (units.macs, 4.038e12, "4.038 TMAC"),
        (units.macs, 3.1e22, "31,000 EMAC"),
        (units.flops, 4.038e12, "8.076 TFLOP"),
        (units.size, 6_098_492_328, "5.680 GiB"),
        (units.size, 1023, "1,023 B"),
        (units.size, 0, "0 B"),
        (units.seconds, 0.184, "184 ms"),
        (units.seconds, 0.0007, "700 µs"),
        (units.seconds, 14.25, "14.2 s"),
        (units.seconds, 372, "6 min 12 s"),
        (units.scientific, 3.1e-7, "3.1e−07"),
        (units.scientific, 0.0, "0"),
        (units.scientific, None, "—"),
        (units.decibels, math.inf, "∞ dB (identical)"),
        (units.decibels, -3.21, "−3.2 dB"),
        (units.decibels, math.nan, "NaN"),
        (units.percent, -0.033, "−3.3 %"),
        (units.percent, -0.0000042, "−0.00042 %"),
        (units.percent, 2.5, "+250 %"),
        (units.figures, 0.967, "0.9670"),
        (units.figures, 12.3456, "12.35"),
    ],
)
def test_words(unit: object, value: float, words: str) -> None:
    assert unit(value) == words  # type: ignore[operator]


def test_a_change_in_words() -> None:
    change = units.Change(1_524_623_082, 1_474_283_562, units.parameters)
    assert (change.direction, change.share, change.delta, change.ratio) == ("less", "−3.3 %", "−50.34 M", "× 0.967")
    assert (change.before_text, change.after_text) == ("1,524.62 M", "1,474.28 M")


def test_a_change_without_a_side_or_a_base() -> None:
    assert units.Change(None, 3.0, units.macs).direction == "unknown"
    assert units.Change(None, 3.0, units.macs).share == "—"
    grown = units.Change(0.0, 3.0, units.macs)
    assert (grown.direction, grown.share, grown.ratio) == ("more", "—", "")
    same = units.Change(3.0, 3.0, units.macs)
    assert (same.direction, same.share, same.delta) == ("same", "unchanged", "±0")


@pytest.mark.parametrize(
    ("value", "found"), [("Infinity", math.inf), (True, None), ("x", None), (None, None), (3, 3.0)]
)
def test_numbers_are_read_carefully(value: object, found: float | None) -> None:
    assert units.number(value) == found
