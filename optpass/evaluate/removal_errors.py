"""What a model's output loses without each of several units: measured with their gates, one closed at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from optpass.ir.graph import Graph
from optpass.ir.program import Program

Calls = Sequence[Mapping[str, Tensor]]


def removal_errors(program: Program, gates: Sequence[str], calls: Mapping[str, Calls]) -> dict[str, float]:
    """The relative error ‖y − y₀‖₂ / ‖y‖₂ of closing each of the ``gates``, weights of ``program`` that are open.

    The mean over an entry's ``calls`` (by entry) of the error over all outputs together; the largest of several entries'.
    Executes each call once, and once more for each gate that its entry reads.

    Raises:
        MissingValuesError: the Program was captured structure-only.
    """
    errors = dict.fromkeys(gates, 0.0)
    for entry, inputs in calls.items():
        graph = program.entries[entry]
        module, read = graph.module(program.weights), set(graph.weight_names)
        expected = _outputs(graph, module, inputs)
        for name in (gate for gate in gates if gate in read):
            value = module.get_parameter(name).data
            value.zero_()
            found = _outputs(graph, module, inputs)
            value.fill_(1.0)
            distances = [_distance(a, b) for a, b in zip(expected, found, strict=True)]
            errors[name] = max(errors[name], sum(distances) / len(distances))
    return errors


def _outputs(graph: Graph, module: GraphModule, calls: Calls) -> list[list[Tensor]]:
    with torch.no_grad():
        return [list(module(*(call[spec.name].to(spec.dtype) for spec in graph.inputs))) for call in calls]


def _distance(reference: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(reference, others, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((error / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-300)) ** 0.5)
