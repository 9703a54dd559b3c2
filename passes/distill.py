"""The pass ``distill``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from optpass.analysis.module_paths import matches
from optpass.errors import UserError, nearest_paths
from optpass.evaluate.given_data import given_items, named_object
from optpass.ir.hashing import file_digest
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context
from optpass.rewrite.unit_removal import GATE
from optpass.training.courses import Courses, GivenCourses, RandomCourses, Trajectories
from optpass.training.exactly import ExactlyOpen
from optpass.training.features import with_features
from optpass.training.losses import Criterion, OutputLoss
from optpass.training.networks import Network, Values, differing_call
from optpass.training.objective import Objective, Supervised
from optpass.training.trainable import Which, chosen
from optpass.training.trainer import accelerated
from optpass.training.training_pass import ORIGINAL, TrainingPass


class Distill(TrainingPass):
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

    With `open_gates`, exactly so many of the gates of `prune-blocks: {gated: true}` are open in every call, the
    others closed; what is found of a gate is its importance, by which `prune-blocks: {importance: gates}` prunes.

    A training that was interrupted goes on from its last checkpoint and ends with the same weights; one that is over
    is not repeated. Both are found by the content of models, data and options, under `work`.

    Leaves alone, and says so: statistics of batch norms, tables that the model's code made, weights in slots, and what
    is read once for many steps (put hoist-invariants behind this pass). Refuses a quantised model, and inputs or
    outputs that the teacher has in another shape.

    Source: distillation, Hinton et al., arXiv 1503.02531; adaptors trained on unrolled trajectories, Clockwork
    Diffusion, arXiv 2312.08128; states of the student mixed in, DDIL, arXiv 2410.11971; exactly n gates, MobileVD,
    arXiv 2412.07583, figure 4.
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
    open_gates: int | None = Field(
        None, ge=1, description="exactly so many of the gates that prune-blocks inserted are open in a call"
    )
    gate_rate: float = Field(0.02, gt=0, description="learning rate of the gates' importances")
    student_states: float = Field(0.5, ge=0, le=1, description="share of generations that the student drives")
    contract = approximate()
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
        yield from self.untrainable(program)
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
        teacher = self.earlier(self.teacher, program, context)
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
            self.hold(courses, self.data)
            return self.trained(
                program,
                networks,
                courses,
                lambda: self._objective(networks[0]),
                accelerator,
                context,
                models=(program, teacher),
                facts={"code": self._code()},
            )

    def _names(self, program: Program, context: Context) -> list[str]:
        return self.trained_names(program, chosen(program, self.train, self.scopes), context)

    def _courses(self, program: Program, teacher: Network) -> Courses:
        call = teacher.call
        if self.data is not None:
            items = given_items(self.data, program, call)
            return GivenCourses(items, call, self.data, calls=self.calls, seed=self.seed)
        if program.origin.pipeline and program.origin.path is not None and program.loop is not None:
            return Trajectories(
                program.origin.path,
                teacher,
                self.asking(program),
                student_states=self.student_states,
                in_order=not program.loop.stateless,
            )
        return RandomCourses(program, call, calls=self.calls, seed=self.seed)

    def _objective(self, student: Network) -> Objective:
        supervised = Supervised(self._criterion())
        if self.open_gates is None:
            return supervised
        gates = [name for name in student.parameters if name.rpartition(".")[2] == GATE]
        return ExactlyOpen(supervised, student, gates, self.open_gates, self.gate_rate)

    def _code(self) -> str:
        """The hash of the task's own loss, where it stands in a file."""
        source = Path((self.task or "").rpartition(":")[0])
        return file_digest(source) if source.suffix == ".py" and source.is_file() else ""

    def _criterion(self) -> Criterion:
        task = named_object(self.task, "task") if self.task is not None else None
        features = self.feature_weight if self.features else 0.0
        return Criterion(self.loss, self.output_weight, self.temperature, features, task, self.task_weight)
