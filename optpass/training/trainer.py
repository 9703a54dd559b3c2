"""The training itself: courses, losses, updates, checkpoints; the same result whether or not it was interrupted."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from optpass.errors import UserError
from optpass.training.asking import STRIDE
from optpass.training.courses import Courses, Lesson, seeded
from optpass.training.networks import Network
from optpass.training.objective import Objective
from optpass.training.state import Folder, Progress

Precision = Literal["fp32", "bf16", "fp16"]
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
TOTAL = "loss"
IDLE = 20
"""Courses in a row in which nothing reached a trained weight, after which nothing will."""


@dataclass(frozen=True)
class Settings:
    """How weights are updated: AdamW, the gradient of ``calls`` calls an update, clipped to the norm ``clip``.

    The learning rate rises in ``warmup`` updates, then stays or falls to 0 as half a cosine. ``average`` is the decay
    of a running mean of the weights, which is then the result (Polyak and Juditsky 1992). A checkpoint is written
    after the first course that ends ``seconds`` after the last one.
    """

    updates: int
    learning_rate: float
    seed: int = 0
    calls: int = 1
    warmup: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float | None = 1.0
    average: float | None = None
    seconds: float = 60.0

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        if update < self.warmup:
            return self.learning_rate * (update + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (update - self.warmup) / max(1, self.updates - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass
class Trainer:
    """Trains ``student`` for an ``objective``, beside its ``teacher``; ``tell`` hears how far it is, and the loss.

    What a course holds depends on its number, the seed, and where the student drives on its weights alone. So a
    checkpoint between two courses has all that the rest depends on: weights, the optimiser's moments, the number.
    """

    student: Network
    teacher: Network
    courses: Courses
    objective: Objective
    settings: Settings
    accelerator: Accelerator
    folder: Folder
    tell: Callable[[float, str], None] = lambda fraction, detail: None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._parameters = self.student.parameters
        self._moved = [value for name, value in self._parameters.items() if name not in self.objective.own]
        # An optimiser of nothing is an error, and the objective may move everything itself.
        moved = self._moved or [torch.nn.Parameter(torch.zeros(()))]
        optimiser = torch.optim.AdamW(moved, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        self._optimiser = self.accelerator.prepare(optimiser)
        average = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._average = average if self.settings.average is not None else None

    def run(self) -> dict[str, Tensor]:
        """Train to the end, from the last checkpoint where there is one; the weights found, float32 on the CPU.

        Raises:
            UserError: a loss is NaN or infinite, or nothing that was learnt from leads to a trained weight.
        """
        self._restore()
        self._began, self._at_first, saved, idle = time.monotonic(), self.progress.updates, time.monotonic(), 0
        while self.progress.updates < self.settings.updates:
            before = self.progress.updates
            with seeded(self.settings.seed * STRIDE + self.progress.course):
                self._course()
            self.progress.course += 1
            idle = 0 if self.progress.updates > before else idle + 1
            if idle == IDLE:
                raise UserError(
                    f"no loss of {IDLE} courses leads to a trained weight: choose others, or another loss; of a model "
                    "that reuses, the steps that reuse must occur"
                )
            if time.monotonic() - saved >= self.settings.seconds:
                self._count(saved)
                saved = time.monotonic()
                self._save()
        self._count(saved)
        found: Mapping[str, Tensor] = self._parameters if self._average is None else self._average
        return self.objective.found({name: value.detach().cpu() for name, value in found.items()})

    def _count(self, since: float) -> None:
        self.progress.seconds += time.monotonic() - since

    def _course(self) -> None:
        """The calls of one course, and the updates that they make."""
        with torch.no_grad(), self.accelerator.autocast():
            lessons = self.courses.course(self.progress.course, self.student.runner, self.teacher.runner)
        learn, teach = self.student.runner(gradients=True), self.teacher.runner()
        for start in range(0, len(lessons), self.settings.calls):
            if self.progress.updates < self.settings.updates:
                self._update(lessons[start : start + self.settings.calls], learn, teach)

    def _update(self, lessons: Sequence[Lesson], learn: Any, teach: Any) -> None:
        """One update from the mean gradient of ``lessons``; none where no loss leads to a trained weight."""
        self._optimiser.zero_grad()
        found: list[dict[str, float]] = []
        for lesson in map(self._placed, lessons):
            with self.accelerator.autocast():
                terms = self.objective.terms(lesson, learn, teach)
            loss = torch.stack(list(terms.values())).sum()
            told = {TOTAL: float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}
            self._check(told)
            if loss.requires_grad:
                self.accelerator.backward(loss / len(lessons))
                found.append(told)
        if not found:
            return
        self._step()
        told = self.objective.step(self.progress.updates, len(lessons))
        self._check(told)
        for name in found[0]:
            told[name] = sum(each.get(name, 0.0) for each in found) / len(found)
        for name, value in told.items():
            self.progress.losses.setdefault(name, []).append(value)
        self._report()

    def _placed(self, lesson: Lesson) -> Lesson:
        """``lesson`` where the networks are, so that whatever is drawn like its tensors is there too."""
        return Lesson(*send_to_device((lesson.inputs, lesson.batch, lesson.expected), self.accelerator.device))

    def _step(self) -> None:
        update, settings = self.progress.updates, self.settings
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate(update)
        if settings.clip is not None:
            self.accelerator.clip_grad_norm_(self._moved, settings.clip)
        self._optimiser.step()
        if self._average is not None and settings.average is not None:
            # At first of few updates: the weights from before training must not stay in it.
            kept = min(settings.average, (update + 1) / (update + 10))
            with torch.no_grad():
                for name, mean in self._average.items():
                    mean.lerp_(self._parameters[name], 1 - kept)

    def _check(self, told: Mapping[str, float]) -> None:
        broken = next((name for name, value in told.items() if not math.isfinite(value)), None)
        if broken is not None:
            where = f"at update {self.progress.updates + 1} (course {self.progress.course})"
            raise UserError(
                f"the loss {broken!r} is {told[broken]} {where}: lower the learning rate "
                f"({self.settings.learning_rate:g}), clip gradients, train in fp32, or look at the data"
            )

    def _report(self) -> None:
        done, of = self.progress.updates, self.settings.updates
        each = (time.monotonic() - self._began) / max(1, done - self._at_first)
        left = each * (of - done)
        shown = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
        self.tell(done / of, f"loss {self.progress.losses[TOTAL][-1]:.3g}, {shown} left")

    def _save(self) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        self.folder.save(
            {
                "course": self.progress.course,
                "losses": self.progress.losses,
                "seconds": self.progress.seconds,
                "parameters": self.student.copied(),
                "optimiser": self._optimiser.state_dict(),
                "average": self._average,
                "objective": self.objective.state(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
        )

    def _restore(self) -> None:
        saved = self.folder.saved()
        if saved is None:
            return
        self.progress = Progress(saved["course"], saved["losses"], saved["seconds"])
        self.student.set(saved["parameters"])
        with torch.no_grad():
            for name, mean in (self._average or {}).items():
                mean.copy_(saved["average"][name])
        self._optimiser.load_state_dict(saved["optimiser"])
        self.objective.restore(saved["objective"])
        if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
            scaler.load_state_dict(saved["scaler"])


@contextmanager
def accelerated(precision: Precision, device: Literal["auto", "cpu"]) -> Iterator[Accelerator]:
    """Device and precision for a training, in deterministic operators; as it was for whatever runs afterwards.

    Raises:
        UserError: this process is one of several (``accelerate launch``): all would write one bundle.
    """
    # Its state is the process's own, and may be somebody else's.
    own = not AcceleratorState._shared_state
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        try:
            accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=device == "cpu")
        except ValueError as error:
            raise UserError(f"cannot train in {precision} on {device}: {error}") from error
        if accelerator.num_processes > 1:
            raise UserError("training runs in one process: start optpass without 'accelerate launch'")
        # cuBLAS is deterministic in workspaces of a fixed size alone; it reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Some operators have no deterministic form; a result is worth more than none.
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield accelerator
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if own:
            AcceleratorState._reset_state()
            PartialState._reset_state()
