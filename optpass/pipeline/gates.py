"""Gates: bounds on numeric error and on quality, checked right after the pass that they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from optpass.errors import GateError, UserError, nearest
from optpass.evaluate.metrics import METRICS, measure
from optpass.evaluate.scope import Scope
from optpass.pipeline.options import validated


class Gate(BaseModel):
    """One bound. The metric compares the Program after the pass with the Program as captured.

    ``component`` is the component of a pipeline whose pass is meant; the denoiser's when empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str
    component: str = ""
    metric: str
    min: float | None = None
    max: float | None = None
    clips: int = Field(8, ge=1, description="how many samples a quality metric generates")
    steps: int = Field(20, ge=1, description="sampling steps of a quality metric, for models made for no number")
    seed: int = 0

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs 'min' or 'max'")
        return self

    def as_document(self) -> dict[str, Any]:
        document = self.model_dump(exclude_none=True)
        return document if self.component else {k: v for k, v in document.items() if k != "component"}

    def check(self, scope: Scope) -> dict[str, Any]:
        """Measure, and return the record for the report.

        Raises:
            GateError: the bound does not hold; the record is its ``record`` attribute.
        """
        value = measure(self.metric, scope, samples=self.clips, steps=self.steps, seed=self.seed)
        held = not math.isnan(value) and (self.min is None or value >= self.min)
        held = held and (self.max is None or value <= self.max)
        record = {**self.as_document(), "value": value, "held": held}
        if not held:
            bound = f"at least {self.min:g}" if self.min is not None else f"at most {self.max:g}"
            place = f"{self.component}: {self.after}" if self.component else self.after
            error = GateError(f"gate after {place!r}: {self.metric} is {value:.4g}, the recipe asks for {bound}")
            error.add_note(str(record))
            raise error
        return record


def gate_of(data: Mapping[str, Any], passes: Callable[[str], Sequence[str]]) -> Gate:
    """A gate from a recipe's entry; ``passes`` gives the names of a component's passes.

    Raises:
        UserError: the kind or metric is not built, the pass is not in the recipe, or no bound is given.
    """
    if "metric" not in data:
        kind = next(iter(set(data) - {"after", "min", "max"}), "?")
        raise UserError(
            f"gate kind {kind!r} is not built: a gate is {{after: PASS, metric: NAME, min: X}}; "
            f"metrics: {', '.join(sorted(METRICS))}"
        )
    gate = validated(Gate, data, "gate")
    if gate.metric not in METRICS:
        raise UserError(f"gate: unknown metric {gate.metric!r}{nearest(gate.metric, METRICS)}")
    known = passes(gate.component)
    if gate.after not in known:
        whose = f"{gate.component} in this recipe" if gate.component else "this recipe"
        raise UserError(f"gate: 'after' names {gate.after!r}, not a pass of {whose}{nearest(gate.after, known)}")
    return gate
