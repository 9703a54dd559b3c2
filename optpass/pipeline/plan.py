"""``optpass plan``: what an apply would do, take and be refused for; ``component_plan`` says how it is foreseen."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optpass.errors import UserError
from optpass.pipeline.apply import as_asked, captured_parts
from optpass.pipeline.component_plan import PROCESS, ComponentPlan, plan_component
from optpass.pipeline.progress import Progress
from optpass.pipeline.recipe import Recipe, check_legality
from optpass.pipeline.request import Request
from optpass.runtime.bundle import BundleWriter
from optpass.runtime.components import component_files

SCHEMA = 1
NOWHERE = Path()
"""As ``Request.out``: no bundle is named yet, only the filesystem that it would lie on."""


@dataclass(frozen=True)
class Plan:
    """What an apply would do, take, and be refused for: a plan for each component, and what they share.

    ``carried`` are bytes of the pipeline's other files, ``free`` those of the disk that the bundle would lie on.
    """

    recipe: Recipe
    components: tuple[ComponentPlan, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    carried: int
    macs_per_second: float
    free: int
    command: str = ""

    @property
    def memory(self) -> int:
        """Peak anonymous bytes: components come one after another, but those that are measured stay for the samples."""
        peaks = [max(stage.memory for stage in part.stages) - PROCESS for part in self.components]
        return PROCESS + (sum(peaks) if self.temporary else max(peaks, default=0))

    @property
    def bundle(self) -> int:
        """Bytes of the finished bundle."""
        return self.carried + sum(part.bundle for part in self.components)

    @property
    def temporary(self) -> int:
        """Bytes of temporary files at their most: the engines of all originals."""
        return sum(part.temporary for part in self.components)

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
    recipe = as_asked(recipe, request)
    refusals = [*_out_refusals(request)]
    if not request.structure_only and (illegal := _refusal(lambda: check_legality(recipe))):
        refusals.append(illegal)
    progress("capture", 0.0)
    captured = captured_parts(recipe, request)
    progress("capture", 1.0)
    parts: list[ComponentPlan] = []
    for part in captured:
        lowers, missing = _lowers(part.recipe, request)
        refusals += missing
        has_values = part.original.has_values or assume_weights
        found = plan_component(
            part.recipe,
            request,
            part.original,
            has_values=has_values,
            lowers=lowers,
            first=not parts,
            progress=progress,
        )
        refusals += found.refusals
        parts.append(found)
    carried = _carried(parts) if any(part.footprint for part in parts) else 0
    made = Plan(recipe, tuple(parts), (), (), carried, _macs_per_second(), _free(request.out), request.command)
    refusals += _disk_refusals(made, request)
    return replace(made, refusals=tuple(refusals), warnings=tuple(_warnings(made)))


def _lowers(recipe: Recipe, request: Request) -> tuple[bool, list[str]]:
    """Whether engines are foreseen, and why not: without its packages, a target cannot say what it supports."""
    if request.structure_only and not recipe.target.structure_only:
        return False, []
    missing = _refusal(lambda: type(recipe.target).check_installed(recipe.target_name))
    if missing:
        return False, [missing]
    lacking = _refusal(recipe.target.check_machine)
    return True, [lacking] if lacking else []


def _carried(parts: Sequence[ComponentPlan]) -> int:
    names = [part.program.origin.component for part in parts if part.program.origin.component]
    files = component_files(parts[0].program.origin, names).values()
    return sum(path.stat().st_size for path in files)


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
