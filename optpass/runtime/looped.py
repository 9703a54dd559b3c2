"""What replaces a sampled model in a pipeline: the entries of its loop behind the captured module's own call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from optpass.errors import UserError
from optpass.ir.interface import Interface, call_interface
from optpass.ir.loop import Listed, Loop
from optpass.ir.program import Program
from optpass.pipeline.target import Runner
from optpass.runtime.generations import Said
from optpass.runtime.loop import LoopRunner
from optpass.runtime.module import EngineModule, component_of


class LoopModule(EngineModule):
    """A module that is called once per step, as the captured one was, and reuses what its schedule says.

    It keeps what belongs to a generation by itself, and starts anew when the calls do
    (:class:`~optpass.runtime.generations.Generations` has the rules). For two generations of the same conditioning
    at a time, give each pipeline a :meth:`fork`.
    """

    runner: LoopRunner

    def __init__(
        self, loop: Loop, interfaces: Mapping[str, Interface], runners: Mapping[str, Runner], **origin: Any
    ) -> None:
        """``origin`` are ``config``, ``library`` and ``class_name`` of :class:`EngineModule`.

        Raises:
            UserError: as :class:`~optpass.runtime.loop.LoopRunner`.
        """
        call = call_interface(loop, interfaces)
        runner = LoopRunner(loop, interfaces, runners)
        super().__init__(loop.signature, call.inputs, call.outputs, runner, dimensions=call.dimensions, **origin)
        self._origin = origin

    def cache_context(self, name: str, **facts: Any) -> AbstractContextManager[None]:
        """What diffusers' pipelines say of their calls: which of a step's it is, which step, of how many."""
        step, of = facts.get("step_index"), facts.get("num_inference_steps")
        return self.runner.generations.saying(Said(name, step, of))

    def reset(self) -> None:
        """Forget every generation in progress: the next call starts one."""
        self.runner.reset()

    def fork(self) -> LoopModule:
        """Another module over the same engines, with generations of its own."""
        loop = self.runner.loop
        other = LoopModule(loop, self.runner.interfaces, self.runner.runners, **self._origin)
        other.runner = self.runner.fork()
        other.precision, other.scales = self.precision, dict(self.scales)
        return other

    @property
    def statistics(self) -> dict[str, int]:
        """How often each entry was called since the module was loaded."""
        return dict(self.runner.statistics)

    @property
    def steps(self) -> int | None:
        """The number of steps that the schedule counts on; ``None`` where it serves any number."""
        return self.runner.steps

    @steps.setter
    def steps(self, number: int) -> None:
        schedule = self.runner.loop.schedule
        if isinstance(schedule, Listed) and number != schedule.of:
            raise UserError(
                f"the schedule lists which of {schedule.of} steps are computed, and does not serve {number}: "
                f"take {schedule.of} steps, or calibrate for that number"
            )
        self.runner.set_steps(number)

    @property
    def ascending(self) -> bool:
        """Whether timesteps grow during a generation (inversion; models that count from noise)."""
        return self.runner.generations.ascending

    @ascending.setter
    def ascending(self, value: bool) -> None:
        self.runner.generations.ascending = value

    @property
    def correlation(self) -> float:
        """The cosine that a step's sample has to the last one's at least, to be of the same generation."""
        return self.runner.generations.correlation

    @correlation.setter
    def correlation(self, value: float) -> None:
        self.runner.generations.correlation = value


def engine_module(program: Program, runners: Mapping[str, Runner]) -> EngineModule:
    """``runners`` (by entry) behind the call that ``program`` was captured from."""
    origin = program.origin
    facts: dict[str, Any] = {"config": origin.config, "library": origin.library, "class_name": origin.class_name}
    if program.loop and not program.loop.stateless:
        return LoopModule(program.loop, program.interfaces, runners, **facts)
    engines = {}
    for name, runner in runners.items():
        graph = program.entries[name]
        engines[name] = EngineModule(
            graph.signature, graph.inputs, graph.outputs, runner, dimensions=graph.dimensions, **facts
        )
    return component_of(engines)


def program_module(program: Program) -> EngineModule:
    """A Program in memory, executed by PyTorch, behind the captured module's call.

    Raises:
        MissingValuesError: the Program was captured structure-only.
    """
    from optpass.evaluate.difference import program_runners

    return engine_module(program, program_runners(program))
