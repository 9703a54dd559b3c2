"""A training's place on disk: how far it has come, and what it found; named by what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.environments.environment import home
from optpass.errors import UserError
from optpass.ir.hashing import tensor_digest
from optpass.ir.program import Program
from optpass.ir.safetensors_io import read_safetensors, write_safetensors
from optpass.ir.text import program_text
from optpass.ir.weights import Constant, Expression
from optpass.runtime.workfolder import alone

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"
VERSION = 1
"""Of what a training does with its options: another one gives other results."""


@dataclass
class Progress:
    """How far a training has come: whole courses, updates of the weights, and the losses of each update by term.

    ``seconds`` are those of all runs up to the last checkpoint.
    """

    course: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def updates(self) -> int:
        return len(self.losses.get("loss", ()))


@dataclass(frozen=True)
class Folder:
    """Where a training keeps its checkpoint, and in the end the weights that it found."""

    path: Path
    key: str

    @property
    def weights(self) -> Path:
        """The trained weights; the name tells trainings apart where only names of files are compared."""
        return self.path / f"trained-{self.key[:12]}.safetensors"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process trains the same.

        Raises:
            UserError: one does, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {self.path}: {error.strerror or error}; set 'work' to another folder"
            ) from None
        with alone(self.path):
            yield

    def reserve(self, tensors: Iterable[Tensor], copies: int, size: int) -> None:
        """Make sure that two checkpoints of ``copies`` of ``tensors`` fit, and ``size`` bytes of results.

        Raises:
            UserError: they do not.
        """
        needed = 2 * copies * sum(tensor.nbytes for tensor in tensors) + size
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"training needs {needed / 2**30:.2f} GiB for its checkpoints in {self.path}, and {free / 2**30:.2f} "
                "are free there; set 'work' to a folder on another disk, or train fewer weights"
            )

    def save(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` (tensors, numbers, names) in the place of the last one, at once or not at all.

        Raises:
            UserError: it cannot be written.
        """
        partial = self.path / f"{CHECKPOINT}.partial"
        try:
            with partial.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / CHECKPOINT)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write the checkpoint in {self.path}: {error}") from error

    def saved(self) -> dict[str, Any] | None:
        """What was saved last; ``None`` where nothing was, or it does not read."""
        try:
            found = torch.load(self.path / CHECKPOINT, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:
            # A damaged file has as many kinds of error as there are ways to read it.
            raise UserError(f"{self.path / CHECKPOINT} is damaged ({type(error).__name__}): remove it") from error
        return dict(found)

    def finish(self, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Write what was found, and let go of the checkpoint.

        Raises:
            UserError: it cannot be written.
        """
        expressions = {name: Constant(value) for name, value in weights.items()}
        write_safetensors(expressions, self.weights)
        partial = self.path / f"{RESULT}.partial"
        partial.write_text(json.dumps(dict(result)), encoding="utf-8")
        partial.replace(self.path / RESULT)
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """What a training that is over recorded; ``None`` where none is."""
        try:
            found = json.loads((self.path / RESULT).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and self.weights.is_file() else None

    def trained(self) -> dict[str, Expression]:
        """The weights that were found, as leaves over their file."""
        return read_safetensors(self.weights)


def folder_of(work: Path | None, key: str) -> Folder:
    """The place of a training: in ``work``, or with what else optpass keeps for the user."""
    return Folder((work or home() / "training") / key[:32], key)


def training_key(programs: Iterable[Program], settings: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a training depends on: structure and weight values of ``programs``, and ``settings``."""
    facts = {**settings, "version": VERSION, "torch": torch.__version__}
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    known: dict[int, str] = {}
    for program in programs:
        found.update(program_text(program, weights=False).encode())
        for name, expression in sorted(program.used_weights().items()):
            if id(expression) not in known:
                known[id(expression)] = tensor_digest(expression.evaluate())
            found.update(f"{name} {known[id(expression)]}\n".encode())
    return found.hexdigest()
