"""The search for the integers of a hybrid model's bridge blocks, over all calls at once, in order of execution."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.module_paths import matches
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.quantization.bridges import bridges
from optpass.quantization.execution import Values, side_by_side
from optpass.quantization.form import QuantizationForm
from optpass.quantization.placement import LINEARS, Weight
from optpass.quantization.program import Quantization
from optpass.quantization.ranges import Ranges
from optpass.quantization.reconstruction import QuantizedOperator, Reconstruction, Sample, Setting, reconstruct
from optpass.quantization.references import gradients, importances, real_outputs
from optpass.quantization.sensitivity import Calls

Objective = Literal["hessian", "l2"]


@dataclass(frozen=True)
class Searched:
    """What was found for the ``operator`` of an ``entry``."""

    entry: str
    operator: Node
    found: Reconstruction

    def as_json(self) -> dict[str, Any]:
        setting, quantizer = self.found.setting, self.found.setting.quantizer
        multiples = torch.ones(1) if setting.multiples is None else setting.multiples
        around_zero = quantizer.zero_point == (quantizer.low + quantizer.high + 1) // 2
        return {
            "entry": self.entry,
            "path": path_of(self.operator),
            "granularity": "tensor" if setting.factor is None else "channel",
            "scheme": "symmetric" if around_zero else "asymmetric",
            "scale": quantizer.scale,
            "zero_point": quantizer.zero_point,
            "weight_multiples": [float(each) for each in (multiples.min(), multiples.median(), multiples.max())],
            "error": {"before": self.found.before, "after": self.found.after},
        }


@dataclass
class BridgeSearch:
    """A ``quantization`` with what was ``searched``; operators that were left as they were, by entry, with reasons."""

    quantization: Quantization
    searched: list[Searched] = field(default_factory=list)
    declined: list[tuple[str, Node, str]] = field(default_factory=list)


def bridge_paths(program: Program) -> tuple[str, ...]:
    """The modules of all bridge blocks of ``program``, each once."""
    found = (node for graph in program.entries.values() for node in bridges(graph).operators)
    return tuple(dict.fromkeys(map(path_of, found)))


def search_bridges(
    program: Program,
    quantization: Quantization,
    calls: Calls,
    paths: Collection[str],
    objective: Objective,
    *,
    correct_biases: bool = False,
) -> BridgeSearch:
    """Choose the integers of the operators under ``paths`` (patterns) by what they add to their outputs on ``calls``.

    ``quantization`` has ranges. Its operators under ``paths`` are taken in order of execution, each with its input as
    those before it leave it, quantised as was chosen; all else is real. The error of an output O is that against the
    real model's: Σ (∂L/∂O · ΔO)² (``hessian``: squared gradients stand for the Hessian's diagonal) or Σ ΔO² (``l2``).
    L is what tells the model with these operators in integers, as they were calibrated, from the real one: the
    Kullback–Leibler divergence of outputs [batch, classes], of others their error relative to the signal.

    A weight that several operators or entries read is searched with the first and then stands, so that it stays one.
    ``correct_biases`` shifts the biases of what was searched by the mean error that is left.

    Executes each call once for the real model, once more with gradients, and once up to the last operator.

    Source: Q-HyViT (arXiv 2303.12557); multiples, rounds, scales, divergence and order are those of its code, where the
    paper leaves them open. Deviations: the calibrated setting is a candidate too, so no error grows; gradients are
    taken once, with calibrated ranges; outputs that are no class scores have a loss; the scheme is chosen where the
    target's form leaves a choice; weights always have a step for each output channel, in −127…127; a depthwise
    convolution's own step for each input channel is chosen by error (not taken always) and made of one step and a
    factor before it, which is exact; products of activations are not searched. Ranges hold 0: no zero point overflows.

    Raises:
        MissingValuesError: the Program was captured structure-only.
        UserError: an operator of the model has no derivative (``hessian``).
    """
    assert quantization.ranges is not None
    assert quantization.form is not None
    result, settled = BridgeSearch(quantization), dict[str, Setting]()
    ranges = dict(quantization.ranges)
    for name, graph in program.entries.items():
        wanted = [w for w in quantization.placements[name].weights if matches(path_of(w.operator), paths)]
        if not wanted:
            continue
        weights = {key: program.weights[key].evaluate() for key in graph.weight_names}
        entry = _Entry(graph, weights, calls[name], quantization.form, settled, correct_biases)
        entry.take(wanted, ranges[name])
        entry.search(objective)
        ranges[name] = entry.changed(ranges[name])
        result.searched += [Searched(name, entry.starts[key][0].node, found) for key, found in entry.found.items()]
        result.declined += [(name, node, why) for node, why in entry.declined]
    result.quantization = replace(quantization, ranges=ranges)
    return result


@dataclass
class _Entry:
    """The search in one graph. ``settled``: by weight, how it was quantised where it was read first."""

    graph: Graph
    weights: Mapping[str, Tensor]
    calls: Sequence[Mapping[str, Tensor]]
    form: QuantizationForm
    settled: dict[str, Setting]
    correct_biases: bool
    starts: dict[str, tuple[QuantizedOperator, Setting]] = field(default_factory=dict)
    declined: list[tuple[Node, str]] = field(default_factory=list)
    found: dict[str, Reconstruction] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def take(self, wanted: Sequence[Weight], ranges: Ranges) -> None:
        """Note the operators that can be searched, with the settings that ``ranges`` have."""
        for weight in wanted:
            node = weight.operator
            if why := _unsearchable(node):
                self.declined.append((node, why))
                continue
            others = [self.weights[str(each.target)] if isinstance(each, Node) else each for each in node.args[2:]]
            operator = QuantizedOperator(node, self.weights[str(weight.read.target)], weight.axis, others)
            quantizer = ranges.activations[operator.source.name, node.name]
            self.starts[node.name] = operator, Setting(quantizer, factor=ranges.factors.get(node.name))

    def search(self, objective: Objective) -> None:
        """Choose for every operator, in order of execution."""
        references = [real_outputs(self.graph, self.weights, inputs, list(self.starts)) for inputs in self.calls]
        errors = [
            gradients(self.graph, self.weights, inputs, self.starts, expected)
            for inputs, (_, expected) in zip(self.calls, references, strict=True)
            if objective == "hessian"
        ]

        def choose(node: Node, values: list[Values]) -> list[Tensor]:
            operator, start = self.starts[node.name]
            inputs = [known[operator.source.name] for known in values]
            targets = [found.pop(node.name) for found, _ in references]
            weighing = importances(errors, node.name)
            if errors and weighing is None and operator.weight_name not in self.settled:
                self.declined.append((node, "bridge search: its error moves no output"))
                self.settled[operator.weight_name] = setting = start
            else:
                samples = list(map(Sample, inputs, targets, weighing or repeat(None)))
                setting = self._choose(operator, start, samples)
            return [operator(value, setting) for value in inputs]

        with torch.no_grad():
            side_by_side(self.graph, self.weights, self.calls, dict.fromkeys(self.starts, choose))

    def _choose(self, operator: QuantizedOperator, start: Setting, samples: Sequence[Sample]) -> Setting:
        node, before = operator.node, self.settled.get(operator.weight_name)
        if before is not None:
            start = replace(start, multiples=before.multiples, factor=before.factor)
        found = reconstruct(operator, samples, start, self.form, of_weight=before is None)
        self.settled.setdefault(operator.weight_name, found.setting)
        self.found[node.name] = found
        if self.correct_biases and len(node.args) > 2 and isinstance(node.args[2], Node):
            self.biases[node.name] = operator.corrected_bias(samples, found.setting)
        return found.setting

    def changed(self, ranges: Ranges) -> Ranges:
        """``ranges`` with what was found."""
        settings = {key: found.setting for key, found in self.found.items()}
        quantizers = {(self.starts[key][0].source.name, key): found.quantizer for key, found in settings.items()}
        factors = {key: factor for key, factor in ranges.factors.items() if key not in settings}
        factors |= {key: found.factor for key, found in settings.items() if found.factor is not None}
        multiples = {key: found.multiples for key, found in settings.items() if found.multiples is not None}
        return replace(
            ranges,
            activations=ranges.activations | quantizers,
            factors=factors,
            multiples=multiples,
            biases=ranges.biases | self.biases,
        )


def _unsearchable(node: Node) -> str:
    """Why the integers of ``node``, which reads a weight, cannot be chosen by its output; empty when they can."""
    value, weight, *others = node.args
    assert isinstance(value, Node)
    assert isinstance(weight, Node)
    if any(isinstance(other, Node) and other.op != "get_attr" for other in others):
        return "bridge search: its bias is computed"
    batched = len(shape_of(value)) > 1 if node.target in LINEARS else len(shape_of(value)) == len(shape_of(weight))
    return "" if batched else "bridge search: its input has no batch"
