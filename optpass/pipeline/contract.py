"""What a pass promises about the function that the graph computes; the manager holds it to that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Contract:
    """``exact``: the same function, to ``rtol``; ``approximate``: the same signature, error measured;
    ``retrain``: new parameters, or another task for the old ones; quality is undefined until a healing pass has run."""

    kind: Literal["exact", "approximate", "retrain"]
    rtol: float = 0.0

    def __str__(self) -> str:
        return f"exact to {self.rtol:g}" if self.kind == "exact" else self.kind


def exact(rtol: float = 1e-5) -> Contract:
    """Same function; ``rtol`` bounds the largest difference relative to the largest value, in float32."""
    return Contract("exact", rtol)


def approximate() -> Contract:
    """Same signature; the error is measured on the real weights and reported."""
    return Contract("approximate")


def retrain() -> Contract:
    """New parameters; a recipe must heal them before its quality means anything."""
    return Contract("retrain")
