"""``optpass plan``: what an apply would do, take and be refused for; ``component_plan`` says how it is foreseen."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optpass.errors import UserError
from optpass.pipeline.apply import captured
from optpass.pipeline.component_plan import ComponentPlan, plan_component
from optpass.pipeline.recipe import Recipe
from optpass.pipeline.request import Progress, Request
from optpass.runtime.bundle import BundleWriter

SCHEMA = 1
NOWHERE = Path()
"""As ``Request.out``: no bundle is named yet, only the filesystem that it would lie on."""


@dataclass(frozen=True)
class Plan:
    """What an apply would do, take, and be refused for. A bundle of several components has a plan for each."""

    recipe: Recipe
    components: tuple[ComponentPlan, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    macs_per_second: float
    free: int
    command: str = ""

    @property
    def memory(self) -> int:
        """Peak anonymous bytes: components are optimised one after another."""
        return max((stage.memory for part in self.components for stage in part.stages), default=0)

    @property
    def bundle(self) -> int:
        """Bytes of the finished bundle."""
        return sum(part.bundle for part in self.components)

    @property
    def temporary(self) -> int:
        """Bytes of temporary files at their most: those of one component at a time."""
        return max((part.temporary for part in self.components), default=0)

    @property
    def read(self) -> int:
        """Bytes of the checkpoint that are gone through, cached or not."""
        return sum(stage.read for part in self.components for stage in part.stages)

    def seconds(self, macs: int) -> float:
        """How long ``macs`` take at least."""
        return macs / self.macs_per_second

    def as_json(self) -> dict[str, Any]:
        macs = sum(stage.macs for part in self.components for stage in part.stages)
        return {
            "schema_version": SCHEMA,
            "command": self.command,
            "recipe": self.recipe.as_document(),
            "goes_through": not self.refusals,
            "refusals": list(self.refusals),
            "warnings": list(self.warnings),
            "memory": self.memory,
            "disk": {"bundle": self.bundle, "temporary": self.temporary, "free": self.free},
            "read": self.read,
            "executes": {"macs": macs, "seconds_at_least": self.seconds(macs)},
            "components": [part.as_json() for part in self.components],
        }


def plan(
    recipe: Recipe,
    request: Request,
    *,
    assume_weights: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> Plan:
    """Foresee ``apply(recipe, request)``; ``request.out`` may be :data:`NOWHERE`.

    ``assume_weights`` takes a checkpoint that has only its configuration for one with all its weights, in the
    dtype that it is captured in.

    Raises:
        UserError: the checkpoint cannot be captured at all. What else would be refused is in ``refusals``.
    """
    recipe = replace(recipe, dtype=request.dtype or recipe.dtype)
    refusals = [*_out_refusals(request)]
    lowers = not request.structure_only or recipe.target.structure_only
    if lowers and (missing := _refusal(lambda: type(recipe.target).check_installed(recipe.target_name))):
        # Without its packages, a target cannot even say what it supports.
        refusals.append(missing)
        lowers = False
    progress("capture", 0.0)
    # One component so far: where a recipe addresses several, each is captured and planned here in turn.
    programs = [captured(recipe, request)]
    progress("capture", 1.0)
    parts = tuple(
        plan_component(
            recipe,
            request,
            program,
            has_values=program.has_values or assume_weights,
            lowers=lowers,
            progress=progress,
        )
        for program in programs
    )
    refusals += [reason for part in parts for reason in part.refusals]
    found = Plan(recipe, parts, (), (), _macs_per_second(), _free(request.out), request.command)
    refusals += _disk_refusals(found, request)
    return replace(found, refusals=tuple(refusals), warnings=tuple(_warnings(found)))


def _refusal(check: Callable[[], None]) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def _out_refusals(request: Request) -> Iterator[str]:
    if request.out == NOWHERE:
        return
    if reason := _refusal(BundleWriter(request.out, force=request.force).refuse_existing):
        yield reason


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _free(out: Path) -> int:
    return shutil.disk_usage(_existing(out)).free


def _disk_refusals(plan: Plan, request: Request) -> Iterator[str]:
    out, temporary = _existing(request.out), Path(tempfile.gettempdir())
    shared = out.stat().st_dev == temporary.stat().st_dev
    needed = plan.bundle + (plan.temporary if shared else 0)
    if needed > plan.free:
        also = f", {plan.temporary:,} of them temporary" if shared and plan.temporary else ""
        yield f"no space at {out}: it takes {needed:,} bytes{also}, and {plan.free:,} are free"
    if not shared and plan.temporary > (free := shutil.disk_usage(temporary).free):
        yield (
            f"no space at {temporary} for the original's engine: it takes {plan.temporary:,} bytes, and {free:,} are "
            "free; set TMPDIR, or apply with --no-baseline"
        )


def _warnings(plan: Plan) -> Iterator[str]:
    if (available := _available_memory()) is not None and plan.memory > available:
        yield f"it takes about {plan.memory:,} bytes of memory, and {available:,} are available now"
    for part in plan.components:
        if not part.program.has_values and part.footprint:
            yield "the checkpoint has no weights: they are assumed to be there, in the dtype of the capture"


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    sizes: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(sizes["MemAvailable"].split()[0]) << 10 if "MemAvailable" in sizes else None


def _macs_per_second(size: int = 768) -> float:
    """The rate of a float32 matrix product here, the best of a few: what a model reaches at the very most."""
    left, right = torch.ones(size, size), torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return float(size**3 / best)
