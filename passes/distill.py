"""The pass ``distill``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from optpass.analysis.module_paths import matches
from optpass.errors import UserError, nearest, nearest_paths
from optpass.evaluate.difference import program_calls
from optpass.evaluate.given_data import given_items, named_object
from optpass.ir.hashing import file_digest
from optpass.ir.loop import usual_steps
from optpass.ir.program import Program
from optpass.ir.quantized import DEQUANTIZERS
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.progress import DETAIL
from optpass.runtime.sampling import LABELS, Asked, usual_guidance
from optpass.training.courses import Courses, GivenCourses, RandomCourses, Trajectories
from optpass.training.features import with_features
from optpass.training.losses import Criterion, OutputLoss
from optpass.training.networks import Network, Values, differing_call
from optpass.training.state import Folder, folder_of, training_key
from optpass.training.trainable import Which, chosen, refusal, running, statistics
from optpass.training.trainer import TOTAL, Precision, Settings, Trainer, accelerated

ORIGINAL = "original"
STEPS = 20
LAST = 10
"""Updates whose mean loss is told as the final one."""
NOT_OF_RESULT = ("work", "checkpoint_seconds", "outcome")
"""Options that the result does not depend on."""


class Distill(Pass):
    """weights that passes left undefined or worse → trained, until the model answers as it did before the changes.

    The teacher is the model that results are compared with (`original`), or as it went into the pass that `teacher`
    names. What trains is `new`: the weights that passes added (adaptors, funnels, gates); or those of modules that
    match `scopes`; or `all`. The loss is the weighted sum of what outputs differ by, of what the modules that match
    `features` return, and of the task's own loss (`task`, a function of outputs and batch, both by name).

    A checkpoint that is a pipeline trains on its own generations, at every step as the schedule has it; a share of
    them, `student_states`, is driven by the student, so that it learns what to make of its own errors. Any other
    trains on `data` (a folder of tensors or images, a dataset by import path or in a Python file), or on random
    inputs, which the report says. The data's hash, seed, updates and final loss go into the lock; data that has
    changed is refused.

    A training that was interrupted goes on from its last checkpoint and ends with the same weights; one that is over
    is not repeated. Both are found by the content of models, data and options, under `work`.

    Leaves alone, and says so: statistics of batch norms, tables that the model's code made, weights in slots, and what
    is read once for many steps (put hoist-invariants behind this pass). Refuses a quantised model, and inputs or
    outputs that the teacher has in another shape.

    Source: distillation, Hinton et al., arXiv 1503.02531; adaptors trained on unrolled trajectories, Clockwork
    Diffusion, arXiv 2312.08128; states of the student mixed in, DDIL, arXiv 2410.11971.
    """

    train: Which = Field("new", description="what passes added, modules that match scopes, or everything")
    scopes: tuple[str, ...] = Field((), description="patterns of module paths or weights, for train: scopes")
    teacher: str = Field(
        ORIGINAL, description="the model as results are compared with it, or as it went into this pass"
    )
    loss: OutputLoss = Field("mse", description="of outputs; kl for logits")
    output_weight: float = Field(1.0, ge=0, description="of the loss of outputs")
    temperature: float = Field(1.0, gt=0, description="of kl")
    features: tuple[str, ...] = Field((), description="patterns of module paths whose outputs are compared as well")
    feature_weight: float = Field(1.0, ge=0, description="of the loss of features")
    task: str | None = Field(None, description="module:name or file.py:name of a loss of (outputs, batch)")
    task_weight: float = Field(1.0, ge=0, description="of the task's own loss")
    data: str | None = Field(
        None, description="a folder of tensors or images, module:name or file.py:name of a dataset"
    )
    student_states: float = Field(0.5, ge=0, le=1, description="share of generations that the student drives")
    steps: int | None = Field(
        None, ge=1, description="sampling steps; by default those that the model is made for, or 20"
    )
    guidance: float | None = Field(None, description="guidance scale; the pipeline's own by default")
    prompt: str | None = Field(None, description="what a text-to-image pipeline is asked for")
    labels: tuple[int, ...] = Field(LABELS, min_length=1, description="classes, in turn")
    call: dict[str, Any] = Field(default_factory=dict, description="further arguments of the pipeline's call")
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

    contract = approximate()
    executes = True
    needs = "generations of the pipeline, or data"
    heals = True

    @field_validator("scopes", "features", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.train == "scopes") != bool(self.scopes):
            raise ValueError("scopes goes with train: scopes, which needs some")
        if not (self.output_weight or (self.features and self.feature_weight) or (self.task and self.task_weight)):
            raise ValueError("there is no loss: give one a weight")
        return self

    def requires(self, program: Program) -> list[str]:
        return list(self._refusals(program))

    def _refusals(self, program: Program) -> Iterator[str]:
        if len(program_calls(program)) > 1:
            yield "the model is called in several ways, and training is of one"
        if any(node.target in DEQUANTIZERS for graph in program.entries.values() for node in graph.calls):
            yield "the model is quantised already: put distill before quantize"
        if self.data is not None and program.loop is not None and not program.loop.stateless:
            yield "its steps hand something to later ones, and data has single calls: train it without 'data'"
        names = program.used_weights()
        for pattern in self.scopes:
            if not any(matches(name, [pattern]) for name in names):
                yield f"scopes: {pattern!r} matches no weight{nearest_paths(pattern, names)}"
        if self.train == "new" and not chosen(program, "new", ()):
            yield (
                "there is nothing new to train: no pass before it added weights; choose modules (train: scopes, "
                "scopes: ['blocks.*']) or train: all"
            )

    def run(self, program: Program, context: Context) -> Program:
        names = self._names(program, context)
        teacher = self._teacher(program, context)
        student, taught = program, teacher
        if self.features and self.feature_weight:
            compared = with_features(program, teacher, self.features)
            for path, reason in compared.declined.items():
                context.decline(path, reason)
            student, taught = compared.student, compared.teacher
        with accelerated(self.precision, self.device) as accelerator:
            values = Values(accelerator.device)
            networks = Network(student, values, names), Network(taught, values)
            if reason := differing_call(networks[0].call, networks[1].call):
                raise UserError(f"{reason}: name the pass that changed it, or one behind it, as 'teacher'")
            courses = self._courses(program, networks[1])
            self._hold(courses)
            folder = folder_of(self.work, self._key((program, teacher), courses, accelerator.device))
            with folder.held():
                found = folder.result()
                if found is None:
                    trainer = Trainer(
                        *networks,
                        courses,
                        self._criterion(),
                        self._settings(),
                        accelerator,
                        folder,
                        lambda fraction, detail: context.progress(f"train{DETAIL}{detail}", fraction),
                    )
                    found = self._trained(program, trainer, folder)
        self._report(found, courses, context)
        return self._with_trained(program, folder, context)

    def _names(self, program: Program, context: Context) -> list[str]:
        """
        Raises:
            UserError: none of those that are meant can be trained.
        """
        found, at_every_step, of_norms = [], running(program), statistics(program)
        for name in chosen(program, self.train, self.scopes):
            if reason := refusal(program, name, at_every_step, of_norms):
                context.decline(name, reason)
            else:
                found.append(name)
        if not found:
            first = context.declined[0]
            raise UserError(f"nothing that was chosen can be trained, such as {first.path}: {first.reason}")
        return found

    def _teacher(self, program: Program, context: Context) -> Program:
        if self.teacher == ORIGINAL:
            return context.original or program
        if self.teacher not in context.earlier:
            known = [ORIGINAL, *context.earlier]
            raise UserError(f"teacher: no pass {self.teacher!r} ran before this one{nearest(self.teacher, known)}")
        return context.earlier[self.teacher]

    def _courses(self, program: Program, teacher: Network) -> Courses:
        call = teacher.call
        if self.data is not None:
            items = given_items(self.data, program, call)
            return GivenCourses(items, call, self.data, calls=self.calls, seed=self.seed)
        if program.origin.pipeline and program.origin.path is not None and program.loop is not None:
            steps = self.steps or usual_steps(program.loop, STEPS)
            guidance = self.guidance if self.guidance is not None else usual_guidance(program.loop, None)
            asked = Asked(self.prompt, self.labels, None, steps, guidance, self.call)
            folder = program.origin.path
            return Trajectories(folder, teacher, asked, student_states=self.student_states, seed=self.seed)
        return RandomCourses(program, call, calls=self.calls, seed=self.seed)

    def _hold(self, courses: Courses) -> None:
        """
        Raises:
            UserError: the data is another than was settled.
        """
        settled = (self.outcome or {}).get("data")
        if self.data is not None and settled not in (None, courses.digest):
            raise UserError(
                f"{self.data} is not the data that was settled (SHA-256 {courses.digest[:12]}… in place of "
                f"{str(settled)[:12]}…); give that, or leave 'outcome' out to train on this"
            )

    def _key(self, programs: tuple[Program, Program], courses: Courses, device: torch.device) -> str:
        options = {name: value for name, value in self.as_options().items() if name not in NOT_OF_RESULT}
        source = Path((self.task or "").rpartition(":")[0])
        code = file_digest(source) if source.suffix == ".py" and source.is_file() else ""
        return training_key(programs, {**options, "data": courses.digest, "device": device.type, "code": code})

    def _criterion(self) -> Criterion:
        task = named_object(self.task, "task") if self.task is not None else None
        features = self.feature_weight if self.features else 0.0
        return Criterion(self.loss, self.output_weight, self.temperature, features, task, self.task_weight)

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

    def _trained(self, program: Program, trainer: Trainer, folder: Folder) -> dict[str, Any]:
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
