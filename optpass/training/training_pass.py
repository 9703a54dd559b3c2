"""What passes that train have in common: their options, where a training is kept, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from optpass.errors import UserError, nearest
from optpass.evaluate.difference import program_calls
from optpass.ir.loop import usual_steps
from optpass.ir.program import Program
from optpass.ir.quantized import DEQUANTIZERS
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.progress import DETAIL
from optpass.rewrite.stepping import computed_entry, without_loop
from optpass.runtime.sampling import LABELS, Asked, usual_guidance
from optpass.training.asking import Asking
from optpass.training.courses import Courses
from optpass.training.networks import Network
from optpass.training.objective import Objective
from optpass.training.state import Folder, folder_of, training_key
from optpass.training.trainable import refusal, running, statistics
from optpass.training.trainer import TOTAL, Precision, Settings, Trainer

ORIGINAL = "original"
STEPS = 20
LAST = 10
"""Updates whose mean loss is told as the final one."""
NOT_OF_RESULT = ("work", "checkpoint_seconds", "outcome")
"""Options that the result does not depend on."""


class TrainingPass(Pass):
    """A pass that trains: deterministic by its seed, interrupted and resumed to the same weights, never repeated."""

    steps: int | None = Field(
        None, ge=1, description="sampling steps; by default those that the model is made for, or 20"
    )
    guidance: float | None = Field(None, description="guidance scale; the pipeline's own by default")
    prompt: str | None = Field(None, description="what a text-to-image pipeline is asked for")
    labels: tuple[int, ...] = Field(LABELS, min_length=1, description="classes, in turn")
    call: dict[str, Any] = Field(default_factory=dict, description="further arguments of the pipeline's call")
    vary: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="numbers among the call's arguments that are drawn between two values"
    )
    updates: int = Field(1000, ge=1, description="updates of the weights")
    calls: int = Field(1, ge=1, description="calls whose mean gradient makes an update")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, at its highest")
    warmup: int = Field(20, ge=0, description="updates in which the learning rate rises")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate after that")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    average: float | None = Field(
        None, gt=0, lt=1, description="decay of a running mean of the weights, the result then"
    )
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    precision: Precision = Field("fp32", description="of the computation; weights are trained in fp32")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes an accelerator where there is one")
    work: Path | None = Field(None, description="folder for checkpoints and trained weights; by default the user's own")
    checkpoint_seconds: float = Field(60.0, ge=0, description="time between checkpoints")
    outcome: dict[str, Any] | None = Field(
        None, description="hash of the data, seed, updates and loss of an earlier run"
    )

    executes = True

    def untrainable(self, program: Program) -> Iterator[str]:
        """Why nothing of ``program`` can be trained; nothing when it can."""
        if len(program_calls(program)) > 1:
            yield "the model is called in several ways, and training is of one"
        if any(node.target in DEQUANTIZERS for graph in program.entries.values() for node in graph.calls):
            yield "the model is quantised already: train it before quantize"

    def unsteppable(self, program: Program, name: str) -> Iterator[str]:
        """Why the pass ``name`` cannot make the steps of ``program`` others; nothing when it can."""
        if program.loop is None:
            yield from without_loop(program)
            return
        if not program.origin.pipeline or program.origin.path is None:
            yield "steps are the pipeline's: give the folder of the whole pipeline, not of the model alone"
        if computed_entry(program.loop) is None or not program.loop.stateless:
            yield f"its steps are split already: put {name} in front of passes that cache"
        yield from self.untrainable(program)

    def trained_names(self, program: Program, names: Collection[str], context: Context) -> list[str]:
        """Those of ``names`` that training may change; the others are declined with their reason.

        Raises:
            UserError: there is none.
        """
        found, at_every_step, of_norms = [], running(program), statistics(program)
        for name in names:
            if reason := refusal(program, name, at_every_step, of_norms):
                context.decline(name, reason)
            else:
                found.append(name)
        if not found:
            first = context.declined[0]
            raise UserError(f"nothing that was chosen can be trained, such as {first.path}: {first.reason}")
        return found

    def earlier(self, name: str, program: Program, context: Context) -> Program:
        """The original (``program`` where there is no other), or what went into the pass ``name``.

        Raises:
            UserError: there is no such pass before this one.
        """
        if name == ORIGINAL:
            return context.original or program
        if name not in context.earlier:
            known = [ORIGINAL, *context.earlier]
            raise UserError(f"teacher: no pass {name!r} ran before this one{nearest(name, known)}")
        return context.earlier[name]

    def asking(self, program: Program) -> Asking:
        """How the pipeline is asked for generations."""
        steps = self.steps or usual_steps(program.loop, STEPS)
        guidance = self.guidance if self.guidance is not None else usual_guidance(program.loop, None)
        return Asking(Asked(self.prompt, self.labels, None, steps, guidance, self.call), self.vary, self.seed)

    def hold(self, courses: Courses, data: str | None) -> None:
        """
        Raises:
            UserError: the data is another than was settled.
        """
        settled = (self.outcome or {}).get("data")
        if data is not None and settled not in (None, courses.digest):
            raise UserError(
                f"{data} is not the data that was settled (SHA-256 {courses.digest[:12]}… in place of "
                f"{str(settled)[:12]}…); give that, or leave 'outcome' out to train on this"
            )

    def trained(
        self,
        program: Program,
        networks: tuple[Network, Network],
        courses: Courses,
        objective: Callable[[], Objective],
        accelerator: Accelerator,
        context: Context,
        *,
        models: Sequence[Program],
        facts: dict[str, Any] | None = None,
    ) -> Program:
        """``program`` with the weights that training the first of ``networks`` beside the second one finds.

        The training is that of ``models``, which with options, data, device and further ``facts`` are its key.
        """
        # Without defaults: an option that comes to be leaves trainings without it what they were.
        options = self.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_OF_RESULT))
        key = training_key(
            models, {**options, "data": courses.digest, "device": accelerator.device.type, **(facts or {})}
        )
        folder = folder_of(self.work, key)
        with folder.held():
            record = folder.result()
            if record is None:
                trainer = Trainer(
                    *networks,
                    courses,
                    objective(),
                    self._settings(),
                    accelerator,
                    folder,
                    lambda fraction, detail: context.progress(f"train{DETAIL}{detail}", fraction),
                )
                record = self._run(program, trainer, folder)
        self._report(record, courses, context)
        return self._with_trained(program, folder, context)

    def _settings(self) -> Settings:
        return Settings(
            self.updates,
            self.learning_rate,
            self.seed,
            self.calls,
            self.warmup,
            self.schedule,
            self.weight_decay,
            self.clip,
            self.average,
            self.checkpoint_seconds,
        )

    def _run(self, program: Program, trainer: Trainer, folder: Folder) -> dict[str, Any]:
        """Train, and write what was found and how; the record of it."""
        parameters = trainer.student.parameters
        dtypes = {name: program.weights[name].dtype for name in parameters}
        # Weights, two moments of the optimiser, and perhaps a mean.
        copies, size = 3 + (self.average is not None), sum(program.weights[name].nbytes for name in parameters)
        folder.reserve(parameters.values(), copies, size)
        found: dict[str, Tensor] = trainer.run()
        record = {
            "weights": len(found),
            "parameters": sum(value.numel() for value in found.values()),
            "device": trainer.accelerator.device.type,
            "courses": trainer.progress.course,
            "losses": trainer.progress.losses,
            "seconds": round(trainer.progress.seconds, 1),
        }
        folder.finish({name: value.to(dtypes[name]) for name, value in found.items()}, record)
        return record

    def _report(self, record: dict[str, Any], courses: Courses, context: Context) -> None:
        losses: dict[str, list[float]] = record["losses"]
        first, last = (sum(part) / len(part) for part in (losses[TOTAL][:LAST], losses[TOTAL][-LAST:]))
        context.settle(outcome={"data": courses.digest, "seed": self.seed, "updates": self.updates, "loss": last})
        context.facts["training"] = {
            **record,
            "source": courses.source,
            "sha256": courses.digest,
            "seed": self.seed,
            "updates": self.updates,
            "precision": self.precision,
            "first": first,
            "last": last,
        }

    def _with_trained(self, program: Program, folder: Folder, context: Context) -> Program:
        """``program`` with the weights that moved, over the file that training wrote."""
        found = folder.trained()
        moved = {n: e for n, e in found.items() if not torch.equal(e.evaluate(), program.weights[n].evaluate())}
        for name in found:
            if name in moved:
                context.rewrote(name)
            else:
                context.decline(name, "it did not move: no loss leads to it, or there was none")
        return replace(program.with_weights(moved), untrained=program.untrained - set(moved))
