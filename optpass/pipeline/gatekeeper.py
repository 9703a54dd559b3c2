"""Callback that checks a recipe's gates after the passes that they follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optpass.errors import GateError
from optpass.evaluate.scope import Scope
from optpass.pipeline.gates import Gate
from optpass.pipeline.manager import Event, Withdrawal
from optpass.pipeline.progress import Progress
from optpass.pipeline.target import Target


class GateKeeper:
    """Checks ``gates``; ``records`` are what they found, for the report."""

    def __init__(self, gates: Sequence[Gate], target: Target, progress: Progress, *, allow_nonfinite: bool) -> None:
        self.gates = gates
        self.target = target
        self.progress = progress
        self.allow_nonfinite = allow_nonfinite
        self.records: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> Withdrawal | None:
        """
        Raises:
            GateError: a bound does not hold, and its gate stops.
        """
        if event.kind != "finished":
            return None
        for gate in self.gates:
            if gate.follows(event.step.name) and (withdrawal := self._check(gate, event)):
                return withdrawal
        return None

    def _check(self, gate: Gate, event: Event) -> Withdrawal | None:
        name = event.step.name
        checked = gate.check(name, self._scope(event))
        self.records.append(dict(checked.record))
        if not checked.complaint:
            return None
        if gate.on_failure == "rollback":
            return Withdrawal(f"{gate.title} gate: {checked.complaint}")
        error = GateError(f"gate after {gate.place(name)}: {checked.complaint}")
        error.add_note(str(checked.record))
        raise error

    def _scope(self, event: Event) -> Scope:
        assert event.after is not None
        assert event.record is not None
        return Scope(
            event.original,
            event.after,
            self.progress,
            before=event.before,
            modified=event.record.modified,
            target=self.target,
            allow_nonfinite=self.allow_nonfinite,
        )
