"""Programs as networks: entries executed by PyTorch with gradients, over one set of parameters, wherever they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from optpass.evaluate.difference import program_calls
from optpass.evaluate.walks import period
from optpass.evaluate.widened import NARROW, widened
from optpass.ir.graph import Graph
from optpass.ir.interface import Interface
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.pipeline.target import Runner
from optpass.runtime.generations import Generation
from optpass.runtime.loop import LoopRunner


class Values:
    """Weights read into memory on a device, in float32 where they were narrower; once for all who share one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[int, tuple[Expression, Tensor]] = {}

    def of(self, expression: Expression) -> Tensor:
        """The values of ``expression``; not to be written to."""
        if id(expression) not in self._known:
            value = expression.evaluate()
            wide = value.float() if value.dtype in NARROW else value
            # With the expression, or its number might become another's.
            self._known[id(expression)] = expression, wide.to(self.device)
        return self._known[id(expression)][1]


class Network:
    """A Program of one call, computing in float32, with gradients for the weights that it is ``trained`` in.

    ``parameters`` are these, by name: copies, which an optimiser may change.
    """

    def __init__(self, program: Program, values: Values, trained: Collection[str] = ()) -> None:
        """
        Raises:
            MissingValuesError: the Program was captured structure-only.
        """
        self.program = widened(program)
        self.call_name, self.call = next(iter(program_calls(self.program).items()))
        self._device = values.device
        read = {name: values.of(expression) for name, expression in program.used_weights().items()}
        self.parameters = {name: nn.Parameter(read[name].clone()) for name in trained}
        tensors = {**read, **self.parameters}
        self._modules = {name: self._module(graph, tensors) for name, graph in self.program.entries.items()}

    def copied(self) -> dict[str, Tensor]:
        """The parameters' values, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values."""
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(values[name])

    def runner(self, *, gradients: bool = False) -> Runner:
        """What answers calls: tensors by name, on whatever device → results by name, on the network's.

        It has no generation in progress. With ``gradients``, results lead back to the parameters, through this call
        alone: what a loop keeps for later steps is taken as given.
        """
        loop = self.program.loop
        if loop is None:
            return self._entry(self.call_name, gradients)
        # What runs once for many steps has no step whose loss it could learn from.
        kept = {*loop.once, *loop.tables}
        entries = {name: self._entry(name, gradients and name not in kept) for name in loop.entries}
        runner = _Stepping(loop, self.program.interfaces, entries)
        if runner.uncounted:
            runner.set_steps(period(loop))
        return runner

    def _entry(self, name: str, gradients: bool) -> Runner:
        module, graph = self._modules[name], self.program.entries[name]
        specs, names = graph.inputs, graph.signature.outputs

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = (tensors[spec.name].to(self._device, spec.dtype) for spec in specs)
            with torch.set_grad_enabled(gradients):
                return dict(zip(names, module(*given), strict=True))

        return run

    def _module(self, graph: Graph, tensors: Mapping[str, Tensor]) -> GraphModule:
        module = graph.module(self.program.weights, values=tensors)
        for node in module.graph.nodes:
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), self._placed)
        module.recompile()
        for name in self.parameters.keys() & set(graph.weight_names):
            path, _, leaf = name.rpartition(".")
            # The graph's own parameter has the same values and a gradient of its own.
            module.get_submodule(path).register_parameter(leaf, self.parameters[name])
        return module

    def _placed(self, argument: Any) -> Any:
        return self._device if isinstance(argument, torch.device) else argument


class _Stepping(LoopRunner):
    """A loop whose states carry no gradient from one step to the next."""

    def _step(self, generation: Generation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = super()._step(generation, tensors)
        generation.states = {name: value.detach() for name, value in generation.states.items()}
        return outputs


def differing_call(student: Interface, teacher: Interface) -> str:
    """Why a student's call cannot be compared with a teacher's, which may take and give more; empty when it can."""
    for own, theirs, what in ((student.inputs, teacher.inputs, "input"), (student.outputs, teacher.outputs, "output")):
        known = {spec.name: spec.shape for spec in theirs}
        for spec in own:
            if known.get(spec.name) != spec.shape:
                was = list(known[spec.name]) if spec.name in known else "not there"
                return f"the {what} {spec.name} is {list(spec.shape)}, and of the teacher {was}"
    return ""
