"""A Program → the same in integers: placed, calibrated and inserted, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from optpass.evaluate.calibration_set import CalibrationSet
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.quantization.form import CHANNELS, QuantizationForm, WeightScheme
from optpass.quantization.insertion import Insertion
from optpass.quantization.placement import Placement, Reason, place, place_weights
from optpass.quantization.ranges import Method, Ranges, find_ranges
from optpass.quantization.sharing import shared


@dataclass(frozen=True)
class Quantization:
    """What of a Program becomes integers, by entry, and the numbers that were found for it.

    ``form`` is ``None`` where weights alone do.
    """

    placements: Mapping[str, Placement]
    form: QuantizationForm | None
    scheme: WeightScheme = CHANNELS
    ranges: Mapping[str, Ranges] | None = None

    @classmethod
    def placed(
        cls, program: Program, form: QuantizationForm | None, scheme: WeightScheme, reason: Callable[[Graph], Reason]
    ) -> Quantization:
        """Where ``form`` (without one: ``scheme``) wants integers; ``reason`` says what of a graph is left alone."""
        placements = {
            name: place(graph, form, reason(graph)) if form else place_weights(graph, scheme, reason(graph))
            for name, graph in program.entries.items()
        }
        return cls(placements, form, scheme)

    @property
    def is_empty(self) -> bool:
        return not any(placement.weights or placement.edges for placement in self.placements.values())

    def calibrated(self, program: Program, calls: CalibrationSet, method: Method) -> Quantization:
        """With the ranges that ``calls`` need. Executes the model, one entry after another."""
        assert self.form is not None
        ranges = {
            name: find_ranges(program.entries[name], program.weights, placement, self.form, calls.entries[name], method)
            for name, placement in self.placements.items()
        }
        if self.form.handing_on:
            ranges = {name: shared(found, self.placements[name]) for name, found in ranges.items()}
        return replace(self, ranges=ranges)

    def restricted(self, wanted: Callable[[Node], bool]) -> Quantization:
        """Of the operators for which ``wanted`` holds alone; ranges stay as they were found."""
        return replace(self, placements={name: p.restricted(wanted) for name, p in self.placements.items()})

    def placed_again(self, program: Program, reason: Callable[[Graph], Reason]) -> Quantization:
        """Of fewer operators, ``reason`` having more to say; ranges stay as they were found.

        Other than :meth:`restricted`, this also drops what served the operators that are gone: additions in integers.
        """
        return replace(self.placed(program, self.form, self.scheme, reason), ranges=self.ranges)

    def applied(self, program: Program) -> Program:
        """``program`` with quantisers; graphs are copied, weights shared between entries as far as they are equal."""
        made: dict[str, Expression] = {}
        entries = {}
        for name, placement in self.placements.items():
            graph = program.entries[name].copy()
            insertion = Insertion(graph, program.weights, made, self.scheme)
            insertion.insert(placement.on(graph), self.ranges[name] if self.ranges else Ranges())
            if self.form is not None and self.form.integer_bias:
                insertion.integer_biases()
            # Reads of real weights that are integers now would keep them in the Program.
            graph.remove_dead_code()
            entries[name] = graph
        return replace(program, entries=entries, weights=program.weights.updated(made))
