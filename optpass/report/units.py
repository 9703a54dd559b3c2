"""Numbers as a reader takes them in: SI and binary prefixes, four figures, signed changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["less", "more", "same", "unknown"]
MINUS, NO_VALUE = "−", "—"
SI = ("", "k", "M", "G", "T", "P", "E")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def number(value: Any) -> float | None:
    """``value`` as a float where it is one (``"Infinity"`` included), else None."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def parameters(value: float) -> str:
    """In millions up to ten billion, as model cards give them: ``1,524.62 M``."""
    if value < 1e6:
        return f"{value / 1e3:,.1f} k" if value >= 1e4 else f"{value:,.0f}"
    return f"{value / 1e6:,.2f} M" if value < 1e10 else f"{value / 1e9:,.2f} B"


def macs(value: float) -> str:
    """Multiply–accumulates: ``401.7 GMAC``."""
    scaled, prefix = _prefixed(value, 1000, SI)
    return f"{figures(scaled)} {prefix}MAC"


def flops(value: float) -> str:
    """Twice the multiply–accumulates: ``8.459 TFLOP``."""
    scaled, prefix = _prefixed(2 * value, 1000, SI)
    return f"{figures(scaled)} {prefix}FLOP"


def size(value: float) -> str:
    """Bytes with binary prefixes: ``2.840 GiB``."""
    scaled, prefix = _prefixed(value, 1024, BINARY)
    return f"{value:,.0f} B" if prefix == "B" else f"{figures(scaled)} {prefix}"


def seconds(value: float) -> str:
    """From microseconds to minutes, in the unit that reads best."""
    if value >= 120:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    if value >= 1:
        return f"{figures(value, 3)} s"
    return f"{figures(value * 1e3, 3)} ms" if value >= 1e-3 or value == 0 else f"{figures(value * 1e6, 3)} µs"


def scientific(value: float | None) -> str:
    """An error: ``3.1e−07``; ``0`` where equal."""
    if value is None:
        return NO_VALUE
    if not math.isfinite(value):
        return _not_finite(value)
    return "0" if value == 0 else f"{value:.1e}".replace("-", MINUS)


def decibels(value: float | None) -> str:
    """``58.2 dB``; infinite when equal."""
    if value is None:
        return NO_VALUE
    if math.isinf(value) and value > 0:
        return "∞ dB (identical)"
    return f"{value:.1f} dB".replace("-", MINUS) if math.isfinite(value) else _not_finite(value)


def figures(value: float, count: int = 4) -> str:
    """``count`` significant figures without an exponent; whole numbers below a thousand stay whole."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value == int(value) and abs(value) < 1000:
        return f"{value:.0f}".replace("-", MINUS)
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 1
    if 0 < abs(value) < 1:
        whole = 1 - math.ceil(-math.log10(abs(value)))
    return f"{value:,.{max(0, min(12, count - whole))}f}".replace("-", MINUS)


def percent(part: float) -> str:
    """A signed share: ``−3.3 %``; two figures below one percent, so that a small change never reads as none."""
    share = 100 * part
    if not math.isfinite(share):
        return _not_finite(share)
    digits = (
        f"{abs(share):,.0f}"
        if abs(share) >= 100
        else f"{abs(share):.1f}"
        if abs(share) >= 1
        else figures(abs(share), 2)
    )
    return f"{MINUS if share < 0 else '+'}{digits} %"


@dataclass(frozen=True)
class Change:
    """One quantity before and after, in words; ``direction`` compares the exact values."""

    before: float | None
    after: float | None
    unit: Callable[[float], str]

    @property
    def direction(self) -> Direction:
        if self.before is None or self.after is None:
            return "unknown"
        return "same" if self.before == self.after else "less" if self.after < self.before else "more"

    @property
    def before_text(self) -> str:
        return NO_VALUE if self.before is None else self.unit(self.before)

    @property
    def after_text(self) -> str:
        return NO_VALUE if self.after is None else self.unit(self.after)

    @property
    def share(self) -> str:
        """``−3.3 %``, ``unchanged``, or a dash where there is nothing to divide by."""
        if self.direction == "same":
            return "unchanged"
        return NO_VALUE if not self.before or self.after is None else percent(self.after / self.before - 1)

    @property
    def ratio(self) -> str:
        """After over before: ``× 0.967``."""
        return "" if not self.before or self.after is None else f"× {figures(self.after / self.before, 3)}"

    @property
    def delta(self) -> str:
        """The signed amount: ``−50.34 M``."""
        if self.before is None or self.after is None or self.direction == "same":
            return "" if self.direction == "unknown" else "±0"
        return f"{MINUS if self.after < self.before else '+'}{self.unit(abs(self.after - self.before))}"


def _prefixed(value: float, base: int, prefixes: tuple[str, ...]) -> tuple[float, str]:
    for prefix in prefixes[:-1]:
        if abs(value) < base:
            return value, prefix
        value /= base
    return value, prefixes[-1]


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
