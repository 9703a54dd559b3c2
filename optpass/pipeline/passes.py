"""The base class of every pass, and what a pass reports about itself."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from optpass.ir.graph import path_of
from optpass.ir.program import Program
from optpass.pipeline.contract import Contract
from optpass.pipeline.options import Options, type_text
from optpass.pipeline.target import Target


@dataclass(frozen=True)
class Declined:
    """A place that looked like the pass's pattern and was left alone, with the reason."""

    entry: str
    path: str
    node: str
    reason: str

    def as_json(self) -> dict[str, str]:
        return {"entry": self.entry, "path": self.path, "node": self.node, "reason": self.reason}


@dataclass
class Context:
    """Where a running pass writes what it did. Sites, declined places and facts end up in the report.

    ``target`` is what the Program will be lowered to, where that is known: for passes whose result depends on it.
    ``original`` is what results are compared with: the Program as captured, or with what a pass put in since then.
    ``earlier`` are the Programs that went into the passes before this one, by the pass's name, the latest of a name.
    ``progress`` is called with a stage's name and the fraction of it that is done.
    """

    target: Target | None = None
    original: Program | None = None
    earlier: Mapping[str, Program] = field(default_factory=dict)
    progress: Callable[[str, float], None] = lambda stage, fraction: None
    sites: list[str] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the report is to say of this pass, as JSON."""
    settled: dict[str, Any] = field(default_factory=dict)

    def rewrote(self, where: fx.Node | str, entry: str = "full") -> None:
        """One more site was changed; a site of another entry than ``full`` is told as ``entry:path``."""
        path = path_of(where) if isinstance(where, fx.Node) else where
        self.sites.append(path if entry == "full" else f"{entry}:{path}")

    def decline(self, where: fx.Node | str, reason: str, entry: str = "full") -> None:
        """``where`` was considered and left alone."""
        path, node = (path_of(where), where.name) if isinstance(where, fx.Node) else (where, "")
        self.declined.append(Declined(entry, path, node, reason))

    def settle(self, **options: Any) -> None:
        """Options of the pass that it chose by measuring: report and lock have them, so that a replay need not."""
        self.settled |= options


class Pass(Options):
    """Program → Program. Subclass, declare options as fields and a ``contract``, implement :meth:`run`.

    The class docstring is the pass's documentation: its first line is shown by ``optpass passes``.
    """

    contract: ClassVar[Contract]
    executes: ClassVar[bool] = False
    """True for a pass that reads weight values while it runs (calibration, training)."""
    needs: ClassVar[str] = ""
    """What a pass that ``executes`` needs beside weight values, in words ("calibration samples"); for plans."""
    heals: ClassVar[bool] = False
    """True for a pass that trains what ``retrain`` passes before it left undefined."""

    @property
    def promise(self) -> Contract:
        """The contract with these options: the class's, where a pass says nothing else."""
        return self.contract

    @property
    def executing(self) -> bool:
        """Whether the pass ``executes`` with these options: not when they say already what it would find out."""
        return self.executes

    def files(self) -> tuple[Path, ...]:
        """Files beside the checkpoint that the result depends on; report and lock file hold their hashes."""
        return ()

    def requires(self, program: Program) -> list[str]:
        """Why this pass cannot run on ``program``; empty when it can. Runs before the pass."""
        return []

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """Rewrite ``program``, whose graphs are this pass's own copies to edit, and return the result.

        Report every changed site with ``context.rewrote`` and every refusal with ``context.decline``.
        """

    def reference(self, program: Program) -> Program:
        """What an ``exact`` pass's result must equal as a function: ``program`` itself, where nothing else is said.

        A pass that puts something in (an adapter) gives the plain form of the same thing, made another way.
        """
        return program

    def ensures(self, program: Program) -> list[str]:
        """What is wrong with the result; empty when nothing is. Runs after the pass, on its result."""
        return []

    @classmethod
    def summary(cls) -> str:
        """The first line of the documentation."""
        return (inspect.getdoc(cls) or "").split("\n", 1)[0]

    @classmethod
    def documentation(cls) -> dict[str, Any]:
        """Name-independent facts for ``optpass passes NAME``."""
        return {
            "summary": cls.summary(),
            "documentation": inspect.getdoc(cls) or "",
            "contract": str(cls.contract),
            "options": {
                name: {
                    "type": type_text(info.annotation),
                    "default": None if info.is_required() else info.get_default(call_default_factory=True),
                    "required": info.is_required(),
                    "description": info.description or "",
                }
                for name, info in cls.model_fields.items()
            },
        }
