"""The base class of every target: what it takes, how it lowers, how its engines are loaded again."""

from __future__ import annotations

import importlib.util
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from optpass.capture.precision import PRECISIONS
from optpass.environments.environment import Environment
from optpass.errors import UserError
from optpass.ir.graph import TensorSpec
from optpass.ir.program import Program
from optpass.ir.slots import Placement, has_slot
from optpass.pipeline.options import Options
from optpass.quantization.form import PORTABLE, QuantizationForm

COPIES = 3
"""Of a weight that is being written: its value, what checks it for NaN and Inf, and what goes to the file."""

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A loaded engine: tensors by input name → tensors by output name."""

Execution = Literal["native", "emulated", "elsewhere"]
"""How :meth:`Target.load` runs an engine on this machine: as it is meant to, in an emulator, or not at all."""


@dataclass(frozen=True)
class Unsupported:
    """Something in a Program that a target cannot take."""

    path: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Which of an engine's ``operators`` the device's own kernels run, as its compiler says.

    ``native`` of them do; the others fall back to something else, as ``elsewhere`` says by module path.
    """

    operators: int
    native: int
    elsewhere: tuple[Unsupported, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Lowering:
    """What a target is given beside the Program: where to write, how to tell of progress."""

    folder: Path
    allow_nonfinite: bool = False
    progress: Callable[[str, float], None] = lambda stage, fraction: None


@dataclass(frozen=True)
class LoweredEntry:
    """One engine: its main file relative to the bundle, and facts for the report.

    ``digests`` gives the hex SHA-256 of files (its own or shared ones) that were hashed while they were
    written; the bundle reads every other file once more for its hash. ``slotted`` is where the weights lie
    whose content can be exchanged later, in a file of raw row-major values; entries that share it say the same.
    ``coverage`` is what runs where, for a device that may not run every operator.
    """

    main: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    slotted: tuple[Placement, ...] = ()
    coverage: Coverage | None = None

    def facts(self) -> dict[str, Any]:
        """``details`` and the coverage, for manifest and report."""
        return {**self.details, **({"coverage": self.coverage.as_json()} if self.coverage else {})}


@dataclass(frozen=True)
class Footprint:
    """What the engines of a Program take, in bytes, as :meth:`Target.predict` foresees it.

    ``disk``: their files. Memory is anonymous, and beyond what the process holds before it lowers: ``lowering``
    at most while they are written, ``checking`` while the target tries what it wrote, and ``loaded`` once they
    are loaded to run, activations excepted; the last two with what lowering leaves behind.
    """

    disk: int
    lowering: int
    checking: int
    loaded: int


class Target(Options):
    """Program → engines. Subclass, declare options as fields, implement the three methods."""

    extra: ClassVar[str] = ""
    """The extra of optpass that installs what this target needs."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable."""
    environment: ClassVar[Environment | None] = None
    """Packages that clash with optpass's own, and are installed apart by ``optpass targets install``."""
    structure_only: ClassVar[bool] = False
    """Whether a Program without weight values can be lowered."""
    floats: ClassVar[frozenset[torch.dtype]] = frozenset(PRECISIONS.values())
    """Dtypes that its engines compute in; a checkpoint of another one is captured in float32, if nobody objects."""
    quantization: ClassVar[QuantizationForm] = PORTABLE
    """The form in which its kernels take quantised Programs."""
    wide_activations: ClassVar[bool] = False
    """Whether it takes activations of 16 bits beside weights of 8."""

    exchanges: ClassVar[bool] = False
    """Whether its engines' exchangeable weights lie in files of raw values (:attr:`LoweredEntry.slotted`)."""

    def runs(self) -> Execution:
        """How :meth:`load` runs what :meth:`lower` wrote, with these options on this machine.

        In an emulator numerics mean something and times do not: an engine is then compared, and not timed.
        """
        return "native"

    @classmethod
    def missing_packages(cls) -> list[str]:
        return [name for name in cls.packages if not _importable(name)]

    @classmethod
    def lacks(cls, name: str) -> str:
        """What has to be installed before the target can be used as ``name``, in few words; empty when nothing."""
        if cls.missing_packages():
            return f"needs optpass[{cls.extra}]"
        if cls.environment is not None and cls.environment.lacks():
            return f"needs: optpass targets install {name} ({cls.environment.gigabytes:g} GB)"
        return ""

    @classmethod
    def check_installed(cls, name: str) -> None:
        """
        Raises:
            UserError: a package is missing, or the target's environment; the message says how to install it.
        """
        if cls.environment is not None:
            cls.environment.interpreter(name)
        if missing := cls.missing_packages():
            raise UserError(
                f"target {name!r} needs {', '.join(missing)}, not installed here; "
                f"install it with: pip install 'optpass[{cls.extra}]'"
            )

    def check_machine(self) -> None:
        """Asked before anything is captured: whether this machine has what lowering with these options takes.

        Raises:
            UserError: a device, a driver or a compiler is not here; the message says what to change.
        """

    def refuses(self, program: Program) -> list[Unsupported]:
        """What of ``program`` cannot be lowered: what the target does not support, and weights it cannot exchange."""
        found = [] if self.exchanges else list(_slots(program))
        return found + self.supports(program)

    def supports(self, program: Program) -> list[Unsupported]:
        """What of ``program`` this target cannot take; empty when it can all. Cheap, reads no weight."""
        return []

    def predict(self, program: Program) -> Footprint:
        """What lowering ``program`` will take once its weights have values; reads none, writes nothing.

        By default: files as large as the weights, written one at a time, with :data:`COPIES` of the largest
        in memory; engines that hold every weight once.

        Raises:
            UserError: for what :meth:`lower` would refuse and :meth:`supports` does not see.
        """
        weights = program.used_weights()
        largest = max((expression.nbytes for expression in weights.values()), default=0)
        return Footprint(weights.nbytes, COPIES * largest, 0, weights.nbytes)

    @abstractmethod
    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write one engine per entry under ``lowering.folder``, weights streamed."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """The engine of one manifest entry, ready to run; files were verified by the caller."""

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Self:
        """This target with ``options``, checked.

        Raises:
            UserError: an option is unknown or bad.
        """
        return cls.from_options(options, owner=f"target {name}")

    @classmethod
    def summary(cls) -> str:
        return (inspect.getdoc(cls) or "").split("\n", 1)[0]


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # Of ``a.b``, where there is no ``a``.
        return False


def _slots(program: Program) -> Iterator[Unsupported]:
    reason = "the target's engines cannot exchange weights after the build; merge the adapter, or choose another target"
    for name, expression in program.used_weights().items():
        if has_slot(expression):
            yield Unsupported(name, "exchangeable weight", reason)
