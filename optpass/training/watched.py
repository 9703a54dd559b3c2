"""A pipeline at work, looked at: what it asks of one model at each step, and what its sampler makes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from optpass.errors import UserError
from optpass.pipeline.target import Runner
from optpass.runtime.folder import build_pipeline
from optpass.runtime.module import EngineModule
from optpass.runtime.sampling import Asked, drive
from optpass.training.networks import Network


@dataclass
class Watched:
    """One step: the calls of the model, by name each; what the sampler was given for them, and what came of it.

    ``guided`` is the answer with guidance, as the pipeline itself puts it together from those of the calls.
    """

    calls: list[dict[str, Tensor]] = field(default_factory=list)
    guided: Tensor | None = None
    sample: Tensor | None = None


class WatchedPipeline:
    """The pipeline in ``folder``, whose model of ``network`` is whatever answers.

    A call with several times the rows that the network takes comes as so many calls.
    """

    def __init__(self, folder: Path, network: Network) -> None:
        """
        Raises:
            UserError: the folder's pipeline cannot be built, or has no scheduler that makes steps.
        """
        self._network = network
        self.component = network.program.origin.component
        # Once: the other models are read only the first time.
        self._pipeline = build_pipeline(folder, {self.component: self.module(_unanswered)})
        self.scheduler: Any = getattr(self._pipeline, "scheduler", None)
        if not callable(getattr(self.scheduler, "step", None)):
            raise UserError(f"a {type(self._pipeline).__name__} has no scheduler with a step: its steps are not known")

    def drive(self, runner: Runner, asked: Asked, seed: int) -> None:
        """One generation, whose calls ``runner`` answers."""
        setattr(self._pipeline, self.component, self.module(runner))
        drive(self._pipeline, samples=1, asked=asked, seed=seed)

    def steps(
        self, runner: Runner, asked: Asked, seed: int, instead: Callable[[Watched], Tensor] | None = None
    ) -> list[Watched]:
        """The steps of one generation, whose calls ``runner`` answers.

        With ``instead``, the sampler goes on with what that makes of a step, and not with the answer that is guided.
        """
        steps = [Watched()]

        def call(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # A pipeline may write into what it gave.
            inputs = {name: value.clone() for name, value in tensors.items()}
            steps[-1].calls.append(inputs)
            given = runner(inputs)
            return {spec.name: given[spec.name].cpu() for spec in self._network.call.outputs}

        step = self.scheduler.step

        def watched(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            now = steps[-1]
            now.guided = model_output.detach().clone()
            result = step(model_output if instead is None else instead(now), *args, **kwargs)
            now.sample = (result[0] if isinstance(result, tuple) else result.prev_sample).detach().clone()
            steps.append(Watched())
            return result

        self.scheduler.step = watched
        try:
            self.drive(call, asked, seed)
        finally:
            del self.scheduler.step
        return steps[:-1]

    def module(self, runner: Runner) -> EngineModule:
        """``runner`` behind the model's own call."""
        program, call = self._network.program, self._network.call
        graph = next(iter(program.entries.values()))
        signature = program.loop.signature if program.loop else graph.signature
        origin = program.origin
        facts: dict[str, Any] = {"config": origin.config, "library": origin.library, "class_name": origin.class_name}
        return EngineModule(signature, call.inputs, call.outputs, runner, dimensions=call.dimensions, **facts)


def _unanswered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    raise AssertionError("no course is on its way")
