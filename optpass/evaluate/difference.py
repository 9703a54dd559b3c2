"""Numeric difference between two Programs of one signature, on random inputs and their real weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from optpass.evaluate.walks import call_trials, compared_calls
from optpass.ir.graph import Graph
from optpass.ir.interface import Interface, call_interface
from optpass.ir.loop import LOOP
from optpass.ir.program import Program
from optpass.ir.weights import WeightStore
from optpass.pipeline.target import Runner

TRIALS = 2
"""Random inputs on which two Programs are compared, at the captured sizes."""
IDENTICAL_DB = 300.0
"""What stands for an infinite ratio in records: float64 itself resolves no more."""


@dataclass(frozen=True)
class Difference:
    """Over all outputs of all entries: the worst of each figure.

    ``max_abs`` is max|a−b|; ``relative_error`` is max|a−b| / max|a|; ``snr`` is
    10·log10(Σa² / Σ(a−b)²) in dB, infinite when equal; ``a`` is the reference.
    """

    max_abs: float
    relative_error: float
    snr: float

    def as_dict(self) -> dict[str, float]:
        """The figures by name; equal tensors have an ``snr`` of :data:`IDENTICAL_DB`, which JSON can say."""
        return {**asdict(self), "snr": min(self.snr, IDENTICAL_DB)}

    def worst(self, other: Difference) -> Difference:
        return Difference(
            _worse(self.max_abs, other.max_abs),
            _worse(self.relative_error, other.relative_error),
            -_worse(-self.snr, -other.snr),
        )


EQUAL = Difference(0.0, 0.0, math.inf)


def _worse(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def tensor_difference(reference: Tensor, other: Tensor) -> Difference:
    """The figures for one pair of tensors of equal shape, computed in float64.

    Infinities and NaN that stand in both at the same place are no difference (masked logits), and count in no
    figure; those that stand in one make it NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(other.shape)}")
    a, b = reference.double(), other.double()
    if a.numel() == 0 or torch.equal(a, b):
        return EQUAL
    compared = ~((a == b) & a.isinf() | a.isnan() & b.isnan())
    a, b = a[compared], b[compared]
    if torch.equal(a, b):
        return EQUAL
    gap = torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), torch.nan)
    peak, noise, signal = float(a.abs().max()), float((gap**2).sum()), float((a**2).sum())
    largest = float(gap.max())
    relative = largest / peak if peak else math.inf
    snr = 10 * math.log10(signal / noise) if signal and noise else -math.inf
    return Difference(largest, relative, math.nan if math.isnan(noise) else snr)


def outputs_difference(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Difference:
    """The worst over the outputs of a call."""
    worst = EQUAL
    for name, value in reference.items():
        worst = worst.worst(tensor_difference(value, other[name]))
    return worst


def runners_difference(reference: Runner, other: Runner, trials: Sequence[Mapping[str, Tensor]]) -> Difference:
    """The worst over the calls in ``trials``."""
    worst = EQUAL
    for inputs in trials:
        worst = worst.worst(outputs_difference(reference(inputs), other(inputs)))
    return worst


def program_difference(reference: Program, other: Program, *, trials: int = TRIALS, seed: int = 0) -> Difference:
    """Run the entries that both Programs have on ``trials`` random inputs each and compare.

    Open dimensions are tried at the ends of their ranges besides.

    Executes both models: first one, then the other, so that one set of weights is in memory at a time.

    Raises:
        MissingValuesError: a Program was captured structure-only.
    """
    worst = EQUAL
    calls, others = program_calls(reference), program_calls(other)
    loop = other.loop if other.loop and not other.loop.stateless else reference.loop
    for name, call in calls.items():
        if name not in others:
            continue
        examples = call_trials(call, reference.ranges, seed, loop=loop, trials=trials)
        steps = compared_calls(loop)
        expected = _answers(reference, name, examples, steps)
        found = _answers(other, name, examples, steps)
        for a, b in zip(expected, found, strict=True):
            worst = worst.worst(outputs_difference(a, b))
    return worst


def _answers(
    program: Program, call: str, examples: Sequence[Mapping[str, Tensor]], steps: int
) -> list[dict[str, Tensor]]:
    from optpass.runtime.loop import call_runners

    entries = list(program.entries) if program.loop else [call]
    run = call_runners(program, program_runners(program, entries), steps)[call]
    return [run(example) for example in examples]


def program_calls(program: Program) -> dict[str, Interface]:
    """What ``program`` is called by: the whole loop under :data:`LOOP`, or every entry under its name."""
    interfaces = program.interfaces
    return {LOOP: call_interface(program.loop, interfaces)} if program.loop else interfaces


def program_runner(program: Program, entry: str) -> Runner:
    """An entry executed by PyTorch on the CPU, weights read into memory once."""
    return program_runners(program, [entry])[entry]


def program_runners(program: Program, entries: Iterable[str] | None = None) -> dict[str, Runner]:
    """Entries (all by default) executed by PyTorch on the CPU; each weight is read into memory once."""
    graphs = {name: program.entries[name] for name in (program.entries if entries is None else entries)}
    read = dict.fromkeys(weight for graph in graphs.values() for weight in graph.weight_names)
    values = {name: program.weights[name].evaluate() for name in read}
    return {name: _graph_runner(graph, program.weights, values) for name, graph in graphs.items()}


def _graph_runner(graph: Graph, weights: WeightStore, values: Mapping[str, Tensor]) -> Runner:
    module = graph.module(weights, values=values)
    specs, names = graph.inputs, graph.signature.outputs

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Not in inference mode: pipelines may write into what a model gave.
        with torch.no_grad():
            results = module(*(tensors[spec.name].to(spec.dtype) for spec in specs))
        return dict(zip(names, results, strict=True))

    return run
