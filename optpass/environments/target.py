"""The base class of targets whose compilers live in an environment of their own."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from pydantic import Field
from torch import Tensor

from optpass.environments.environment import Environment
from optpass.environments.worker import RemoteEngine, Worker
from optpass.errors import MissingValuesError
from optpass.ir.graph import Graph, TensorSpec, path_of
from optpass.ir.program import Program
from optpass.ir.text import operator_name
from optpass.ir.weights import dtype_from_name, dtype_name
from optpass.pipeline.target import Coverage, LoweredEntry, Lowering, Runner, Target, Unsupported

LATEST = 2
"""Processes that live on after they built an engine, of all targets together: each holds a model."""


class ApartTarget(Target):
    """A target that builds, and runs where it can, in a subprocess of its :attr:`environment`.

    A subclass names itself as it is registered, gives the script of its worker, and implements :meth:`_build`,
    :meth:`_opened` where its engines run in another process than the one that built them, and :meth:`runs`.
    """

    time_limit: float = Field(0, ge=0, description="seconds that one request to the compiler may take; 0: no limit")

    name: ClassVar[str]
    environment: ClassVar[Environment]
    script: ClassVar[Path]
    dtypes: ClassVar[frozenset[torch.dtype]]
    """Of everything that a graph computes."""

    def supports(self, program: Program) -> list[Unsupported]:
        """Open sizes, and dtypes that the compiler does not know, by module path."""
        return [found for graph in program.entries.values() for found in self._unsupported(graph)]

    def _unsupported(self, graph: Graph) -> Iterator[Unsupported]:
        for item in graph.dimensions:
            yield Unsupported("(interface)", item.name, "its engines have fixed sizes; give one with --inputs")
        for spec in (*graph.inputs, *graph.outputs):
            if spec.dtype not in self.dtypes:
                yield Unsupported("(interface)", spec.name, f"{self.name} has no {dtype_name(spec.dtype)}")
        for node in graph.calls:
            value = node.meta["val"]
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, Tensor) and each.dtype not in self.dtypes:
                    reason = f"{self.name} has no {dtype_name(each.dtype)}; capture with --dtype float32"
                    yield Unsupported(path_of(node), operator_name(node), reason)
                    break

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write one engine for each entry, in subprocesses.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: the environment is missing, or the compiler fails; the message has its own words, and the
                module path where it names a place.
        """
        if not program.has_values:
            raise MissingValuesError(f"{self.name} needs weight values; the checkpoint was captured structure-only")
        return self._lowered(program, lowering)

    @abstractmethod
    def _lowered(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """As :meth:`lower`, of a Program with values."""

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """The engine of one manifest entry, in a subprocess of its own.

        Raises:
            UserError: the environment is missing, or refuses the engine.
        """
        target, engine = cls.of(cls.name, options), folder / str(entry["engine"])
        inputs, outputs = specs(entry["inputs"]), specs(entry["outputs"])
        return RemoteEngine(target._opened(engine, entry), engine, inputs, outputs)

    def _opened(self, engine: Path, entry: Mapping[str, Any]) -> Worker:
        """A worker that can load ``engine``."""
        return self.worker()

    def worker(self) -> Worker:
        """A new process in the environment.

        Raises:
            UserError: it is not installed.
        """
        return Worker(self.name, self.environment.interpreter(self.name), self.script, time_limit=self.time_limit)


class RebuildingTarget(ApartTarget):
    """A target whose emulator runs only what was built in its own process, from a source that stays in the bundle.

    The process that built an engine lives on for a while: who loads the engine next, to measure it, gets that.
    A subclass implements :meth:`_build`, lets :meth:`_keep` have the result, and tells the source in an entry's
    ``details`` as ``source``, relative to the engine's folder.
    """

    _built: ClassVar[WeakValueDictionary[Path, Worker]] = WeakValueDictionary()
    _latest: ClassVar[list[Worker]] = []

    @abstractmethod
    def _build(self, source: Path, entry: str, engine: Path) -> tuple[Worker, Mapping[str, Any]]:
        """The process that built ``engine`` from the ``source`` of ``entry``, and what it says of it."""

    def _keep(self, engine: Path, worker: Worker) -> None:
        self._built[engine.absolute()] = worker
        self._latest.append(worker)
        del self._latest[:-LATEST]

    def _opened(self, engine: Path, entry: Mapping[str, Any]) -> Worker:
        built = self._built.pop(engine.absolute(), None)
        if built is not None:
            return built
        source = engine.with_name(str(entry["details"]["source"]))
        with tempfile.TemporaryDirectory() as folder:
            return self._build(source, engine.stem, Path(folder, engine.name))[0]


def specs(records: Sequence[Mapping[str, Any]]) -> list[TensorSpec]:
    """The tensors of a manifest entry."""
    return [
        TensorSpec(str(each["name"]), tuple(each["shape"]), dtype_from_name(str(each["dtype"]))) for each in records
    ]


def coverage(operators: int, native: int, left: Sequence[Mapping[str, str]], reason: str) -> Coverage:
    """What a compiler told of where operators run; each of those ``left`` has a path, an operator, maybe a reason."""
    elsewhere = tuple(Unsupported(each["path"], each["operator"], each.get("reason") or reason) for each in left)
    return Coverage(operators, native, elsewhere)
