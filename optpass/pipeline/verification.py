"""Callback that holds every pass to its contract, by executing the Program before and after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from optpass.analysis.cost import Cost, Totals
from optpass.errors import ContractError
from optpass.evaluate.difference import EQUAL, Difference, program_difference
from optpass.evaluate.widened import widened
from optpass.ir.program import Program
from optpass.pipeline.contract import Contract
from optpass.pipeline.manager import Event

Mode = Literal["auto", "always", "never"]
MACS_LIMIT = 2e11
BYTES_LIMIT = 2 << 30


@dataclass(frozen=True)
class Verification:
    """``auto`` executes models up to 0.2 TMAC a call and 2 GiB of weights; larger ones only ``always``."""

    mode: Mode = "auto"
    seed: int = 0

    def __call__(self, event: Event) -> None:
        """
        Raises:
            ContractError: an ``exact`` pass changed the function by more than its tolerance.
        """
        if event.kind != "finished" or event.record is None or event.after is None:
            return
        facts, contract = event.record.facts, event.step.record.promise
        if reason := self._skipped(event):
            facts |= {"difference": None, "verified": f"not verified: {reason}"}
            return
        reference = event.reference or event.before
        difference = self._difference(reference, event.after, contract) if event.record.modified else EQUAL
        facts["difference"] = difference.as_dict()
        error = difference.relative_error
        if contract.kind != "exact":
            facts["verified"] = "measured"
            return
        if math.isnan(error) or error > contract.rtol:
            raise ContractError(
                f"pass {event.step.name!r} declares itself {contract}, and its largest relative difference "
                f"on random inputs is {error:.3g}"
            )
        facts["verified"] = f"held: {error:.2g} ≤ {contract.rtol:g}"

    def _difference(self, before: Program, after: Program, contract: Contract) -> Difference:
        # An exact pass promises more than half precision resolves.
        wide = contract.kind == "exact"
        pair = (widened(before, unrounded=True), widened(after, unrounded=True)) if wide else (before, after)
        return program_difference(*pair, seed=self.seed)

    def _skipped(self, event: Event) -> str:
        assert event.record is not None
        assert event.after is not None
        reason = skipped(self.mode, event.step.record.promise, event.record.before, event.before.has_values)
        return reason or resized_inputs(event.before, event.after)


def skipped(mode: Mode, contract: Contract, before: Cost, has_values: bool) -> str:
    """Why a pass with ``contract`` is not verified on a Program that costs ``before``; empty when it is."""
    if mode == "never":
        return "switched off"
    if not has_values:
        return "captured structure-only"
    if contract.kind == "retrain":
        return "new parameters"
    if mode == "auto" and not is_small(before.totals):
        totals = before.totals
        return f"{totals.macs / 1e9:,.0f} GMAC and {totals.weight_bytes / 2**30:.1f} GiB; ask with --verify always"
    return ""


def resized_inputs(before: Program, after: Program) -> str:
    """Why two Programs are not called with the same tensors; empty when they are."""
    shapes = {spec.name: spec.shape for entry in before.interfaces.values() for spec in entry.inputs}
    for entry in after.interfaces.values():
        for spec in entry.inputs:
            if spec.name in shapes and shapes[spec.name] != spec.shape:
                return f"the input {spec.name} has another size than before"
    return ""


def is_small(totals: Totals) -> bool:
    """Whether a model is executed without being asked for: 0.2 TMAC a call and 2 GiB of weights at most."""
    return totals.macs <= MACS_LIMIT and totals.weight_bytes <= BYTES_LIMIT
