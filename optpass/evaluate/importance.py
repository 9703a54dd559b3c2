"""How much each weight matters to what a Program computes: the first-order Taylor criterion |w·∂L/∂w|.

Without a training loss, L = ⟨v, y⟩ / ‖y‖ for random v ~ N(0, 1): for one v it says how the output moves in one
direction, and over several calls it says how far, for E[⟨v, Δy⟩²] = ‖Δy‖². Setting a weight to zero changes L by
−w·∂L/∂w in first order. Source: Molchanov et al., arXiv 1906.10771, equation 8 (there with the training loss, squared).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from optpass.analysis.cost import statistics_of
from optpass.evaluate.difference import program_calls
from optpass.evaluate.observation import computing
from optpass.evaluate.trials import random_inputs
from optpass.evaluate.widened import widened
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.pipeline.target import Runner
from optpass.runtime.loop import LoopRunner, call_runners
from optpass.runtime.looped import LoopModule, program_module
from optpass.runtime.sampling import Asked, drive

Calls = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""Inputs by name, for each of the calls that a Program answers (:func:`~optpass.evaluate.difference.program_calls`)."""
Note = Callable[[Mapping[str, Tensor]], None]


def taylor_importance(program: Program, calls: Calls, *, seed: int = 0) -> dict[str, Tensor]:
    """The mean of |w·∂L/∂w| over ``calls``, for every floating weight that is no running
    statistic: of its shape, float32, not negative.

    A loop is asked for its computed variant, each call being a generation's first. One backward at a time; the model
    is in memory once, in float32, its gradients and the result beside it.

    Raises:
        MissingValuesError: the Program was captured structure-only.
    """
    wide = widened(program)
    values = {name: expression.evaluate().detach() for name, expression in wide.used_weights().items()}
    fixed = {name for graph in wide.entries.values() for name in statistics_of(graph)}
    trained = {name: value for name, value in values.items() if value.is_floating_point() and name not in fixed}
    weights = {name: value.detach().requires_grad_() for name, value in trained.items()}
    runners = {name: _differentiable(graph, wide, values | weights) for name, graph in wide.entries.items()}
    looped = replace(wide, loop=computing(wide.loop)) if wide.loop else wide
    found = {name: torch.zeros(value.shape) for name, value in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for name, trials in calls.items():
        for inputs in trials:
            # A new runner each time: what a loop remembers would hold on to the last call's graph.
            outputs = call_runners(looped, runners)[name](inputs)
            for weight, gradient in _gradients(outputs, weights, generator).items():
                found[weight] += (gradient * values[weight]).abs().float()
    count = max(1, sum(map(len, calls.values())))
    return {name: value / count for name, value in found.items()}


def random_calls(program: Program, count: int, seed: int = 0) -> dict[str, list[dict[str, Tensor]]]:
    """``count`` random inputs of every call, at the captured sizes."""
    return {
        name: [random_inputs(call.inputs_at(), program.ranges, seed + index) for index in range(count)]
        for name, call in program_calls(program).items()
    }


def sampled_calls(
    program: Program, pipeline: object, asked: Asked, count: int, *, samples: int = 1, seed: int = 0
) -> dict[str, list[dict[str, Tensor]]]:
    """``count`` calls that ``pipeline`` makes of ``program`` while it generates, evenly spaced over all its steps.

    ``pipeline`` is one in memory, whose component the Program was captured from; it gets the component replaced.

    Raises:
        UserError: the pipeline's call needs something that ``asked`` has not.
    """
    (name,) = program_calls(program)
    module = program_module(program)
    seen: list[dict[str, Tensor]] = []

    def note(inputs: Mapping[str, Tensor]) -> None:
        seen.append({key: value.detach().clone() for key, value in inputs.items()})

    if isinstance(module, LoopModule):
        module.runner = _Noting(module.runner, note)
    else:
        module.runner = _noted(module.runner, note)
    setattr(pipeline, program.origin.component, module)
    drive(pipeline, samples=samples, asked=asked, seed=seed)
    places = torch.linspace(0, len(seen) - 1, min(count, len(seen))).round().int().tolist()
    return {name: [seen[place] for place in places]}


def _differentiable(graph: Graph, program: Program, values: Mapping[str, Tensor]) -> Runner:
    specs, given = graph.inputs, {name: values[name] for name in graph.weight_names}
    module = graph.module(program.weights, values={name: value.detach() for name, value in given.items()})

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arguments = tuple(tensors[spec.name].to(spec.dtype) for spec in specs)
        # In place of the module's own parameters, which take no gradients.
        results = torch.func.functional_call(module, given, arguments)
        return dict(zip(graph.signature.outputs, results, strict=True))

    return run


def _gradients(
    outputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """∂L/∂w of one call, for the weights that any floating output depends on."""
    terms = [
        (output.float() * torch.randn(output.shape, generator=generator)).sum() / output.detach().float().norm()
        for output in outputs.values()
        if output.requires_grad and output.detach().any()
    ]
    if not terms:
        return {}
    found = torch.autograd.grad(torch.stack(terms).sum(), list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


class _Noting(LoopRunner):
    """Notes the inputs of every step."""

    def __init__(self, runner: LoopRunner, note: Note) -> None:
        super().__init__(runner.loop, runner.interfaces, runner.runners)
        self._note = note

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._note(tensors)
        return super().__call__(tensors)


def _noted(runner: Runner, note: Note) -> Runner:
    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        note(tensors)
        return runner(tensors)

    return run
