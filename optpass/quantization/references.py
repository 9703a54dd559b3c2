"""What operators in integers are held against: their real outputs, and how much an error there moves the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import kl_div, log_softmax, softmax

from optpass.errors import UserError
from optpass.ir.graph import Graph
from optpass.quantization.execution import Values, call, execute, given
from optpass.quantization.reconstruction import QuantizedOperator, Setting
from optpass.quiet import first_lines

Call = Mapping[str, Tensor]


def real_outputs(
    graph: Graph, weights: Mapping[str, Tensor], inputs: Call, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of the operators ``names``, and those of the graph, in one call."""
    found: dict[str, Tensor] = {}

    def noting(node: Node, values: Values) -> Any:
        found[node.name] = call(node, values)
        return found[node.name]

    with torch.no_grad():
        results = execute(graph, given(graph, weights, inputs), dict.fromkeys(names, noting))
    return found, results


def gradients(
    graph: Graph,
    weights: Mapping[str, Tensor],
    inputs: Call,
    settings: Mapping[str, tuple[QuantizedOperator, Setting]],
    expected: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """∂L/∂O of every operator's output O in one call with all ``settings`` in place, L being the :func:`divergence`.

    Raises:
        UserError: an operator of the graph has no derivative.
    """
    shifts: dict[str, Tensor] = {}

    def shifted(node: Node, values: Values) -> Tensor:
        operator, setting = settings[node.name]
        value = operator(values[operator.source.name], setting)
        shifts[node.name] = torch.zeros_like(value, requires_grad=True)
        return value + shifts[node.name]

    try:
        with torch.enable_grad():
            results = execute(graph, given(graph, weights, inputs), dict.fromkeys(settings, shifted))
            loss = divergence(expected, results)
            if not loss.requires_grad:
                return {name: torch.zeros_like(shift) for name, shift in shifts.items()}
            found = torch.autograd.grad(loss, list(shifts.values()), allow_unused=True, materialize_grads=True)
    except (RuntimeError, NotImplementedError) as error:
        told = first_lines(error, 1)
        raise UserError(f"search: hessian needs gradients, and the model has none ({told}); give search: l2") from error
    return dict(zip(shifts, found, strict=True))


def divergence(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Tensor:
    """Of outputs [batch, classes] the Kullback–Leibler divergence, of others ‖ŷ − y‖² / ‖y‖²; their sum."""
    total = torch.zeros(())
    for name, real in expected.items():
        if not real.is_floating_point():
            continue
        if real.ndim == 2:
            total = total + kl_div(log_softmax(found[name], -1), softmax(real, -1), reduction="batchmean")
        elif signal := float(real.square().sum()):
            total = total + (found[name] - real).square().sum() / signal
    return total


def importances(found: Sequence[Mapping[str, Tensor]], name: str) -> list[Tensor] | None:
    """The gradients of one operator over calls, of mean square 1; ``None`` where all are 0, or there are none."""
    values = [gradient[name] for gradient in found]
    power = sum(float(value.double().square().sum()) for value in values)
    root = (power / max(1, sum(value.numel() for value in values))) ** 0.5
    return [value / root for value in values] if power else None
