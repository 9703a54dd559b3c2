"""Gates: bounds on numeric error, on quality and on latency, checked right after a pass.

What does not hold stops the run, or has the pass's result dropped (``on_failure: rollback``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from optpass.errors import UserError, nearest
from optpass.evaluate.latency import RUNS, Ratio
from optpass.evaluate.metrics import METRICS, measure
from optpass.evaluate.scope import Scope
from optpass.pipeline.options import validated
from optpass.pipeline.target import Target

LATENCY = "latency"
FEWEST = 8
"""Pairs of times that an interval of their ratios takes."""


@dataclass(frozen=True)
class Checked:
    """What a gate found: its record for the report, and why it does not hold, empty when it does."""

    record: Mapping[str, Any]
    complaint: str = ""


class Gate(BaseModel):
    """One bound, checked after the pass ``after``.

    ``component`` is the component of a pipeline whose pass is meant; the denoiser's when empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str = ""
    component: str = ""
    on_failure: Literal["stop", "rollback"] = "stop"

    @property
    @abstractmethod
    def title(self) -> str:
        """What it bounds, in a word."""

    def follows(self, name: str) -> bool:
        """Whether it is checked after the pass ``name``: one that names none, after every pass."""
        return self.after in ("", name)

    def refuses(self, target_name: str, target: Target) -> str:
        """Why it cannot be checked for what is lowered to ``target``; empty when it can."""
        return ""

    def as_document(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        document = self.model_dump(exclude_none=True)
        unsaid = {"after": "", "component": "", "on_failure": "stop"}
        return {key: value for key, value in document.items() if key not in unsaid or value != unsaid[key]}

    @abstractmethod
    def check(self, name: str, scope: Scope) -> Checked:
        """Measure what the pass ``name`` left.

        Raises:
            UserError: it cannot be measured.
        """

    def place(self, name: str) -> str:
        """The pass as messages name it."""
        return repr(f"{self.component}: {name}" if self.component else name)


class MetricGate(Gate):
    """``{after: cast, metric: psnr, min: 30}``: the Program after the pass, beside the Program as captured."""

    after: str
    metric: str
    min: float | None = None
    max: float | None = None
    clips: int = Field(8, ge=1, description="how many samples a quality metric generates")
    steps: int = Field(20, ge=1, description="sampling steps of a quality metric, for models made for no number")
    seed: int = 0

    @model_validator(mode="after")
    def _bounded(self) -> MetricGate:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs 'min' or 'max'")
        return self

    @property
    def title(self) -> str:
        return self.metric

    def check(self, name: str, scope: Scope) -> Checked:
        value = measure(self.metric, scope, samples=self.clips, steps=self.steps, seed=self.seed)
        held = not math.isnan(value) and (self.min is None or value >= self.min)
        held = held and (self.max is None or value <= self.max)
        record = {**self.as_document(), "value": value, "held": held}
        if held:
            return Checked(record)
        bound = f"at least {self.min:g}" if self.min is not None else f"at most {self.max:g}"
        return Checked(record, f"{self.metric} is {value:.4g}, the recipe asks for {bound}")


class LatencyBound(BaseModel):
    """What a latency gate asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_ratio: float = Field(gt=0, description="the time after the pass over the time before it, at most")
    runs: int = Field(RUNS, ge=FEWEST, description="alternating pairs of timed calls")
    seed: int = 0


class LatencyGate(Gate):
    """``{after: quantize, latency: {max_ratio: 1.0}}``: the target's engine after the pass, beside the one before it.

    It does not hold where the time is above the bound beyond noise; a ratio that noise does not tell from the bound
    counts as kept.
    """

    latency: LatencyBound

    @property
    def title(self) -> str:
        return LATENCY

    def refuses(self, target_name: str, target: Target) -> str:
        how = target.runs()
        if how == "native":
            return ""
        where = "in an emulator, whose times mean nothing" if how == "emulated" else "on other hardware only"
        return f"a latency gate needs engines that run on this machine, and those of target {target_name!r} run {where}"

    def check(self, name: str, scope: Scope) -> Checked:
        document = {**self.as_document(), "after": name, "metric": LATENCY, "max": self.latency.max_ratio}
        if not scope.modified:
            return Checked({**document, "value": 1.0, "held": True, "note": "the pass changed nothing"})
        from optpass.evaluate.engine_latency import engine_latency

        found = engine_latency(scope, runs=self.latency.runs, seed=self.latency.seed)
        ratio, bound = found.ratio, self.latency.max_ratio
        held = not ratio.exceeds(bound)
        record = {
            **document,
            "value": ratio.median,
            "held": held,
            "note": _note(ratio, bound),
            "times": found.as_dict(),
        }
        if held:
            return Checked(record)
        times = f"{found.before.median:.3g} → {found.after.median:.3g} ms"
        interval = f"{ratio.low:.3f} … {ratio.high:.3f}"
        asked = f"the recipe asks for at most {bound:g}"
        return Checked(record, f"the engine takes {ratio.median:.3f} ({interval}) of its time before, {times}; {asked}")


def _note(ratio: Ratio, bound: float) -> str:
    if ratio.exceeds(bound) or ratio.high < bound:
        return ""
    return f"noise does not tell the ratio ({ratio.low:.3f} … {ratio.high:.3f}) from {bound:g}: it counts as kept"


def gate_of(data: Mapping[str, Any], passes: Callable[[str], Sequence[str]]) -> Gate:
    """A gate from a recipe's entry; ``passes`` gives the names of a component's passes.

    Raises:
        UserError: the kind or metric is not built, the pass is not in the recipe, or no bound is given.
    """
    gate: Gate
    if LATENCY in data:
        gate = validated(LatencyGate, data, "gate")
    elif "metric" in data:
        gate = validated(MetricGate, data, "gate")
        if gate.title not in METRICS:
            raise UserError(f"gate: unknown metric {gate.title!r}{nearest(gate.title, METRICS)}")
    else:
        kind = next(iter(set(data) - {"after", "min", "max"}), "?")
        raise UserError(
            f"gate kind {kind!r} is not built: a gate is {{after: PASS, metric: NAME, min: X}} or "
            f"{{after: PASS, latency: {{max_ratio: X}}}}; metrics: {', '.join(sorted(METRICS))}"
        )
    known = passes(gate.component)
    if gate.after and gate.after not in known:
        whose = f"{gate.component} in this recipe" if gate.component else "this recipe"
        raise UserError(f"gate: 'after' names {gate.after!r}, not a pass of {whose}{nearest(gate.after, known)}")
    return gate
