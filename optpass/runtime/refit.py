"""Other adapters into a finished bundle: only the tensors that adapters change are written."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optpass.adapters.exchangeable import DOWN, MERGED, UP, content_of
from optpass.adapters.ldm_names import layout_paths
from optpass.adapters.matching import Adaptable, belonging
from optpass.adapters.planning import Adaptations, Chosen, plan_adapters, read_adapters
from optpass.adapters.sites import SUFFIX, Site
from optpass.capture.configs import PIPELINE_INDEX
from optpass.errors import UserError
from optpass.ir.weights import Absent, Expression, Shape
from optpass.runtime.bundle import Manifest, PartRecord, read_manifest
from optpass.runtime.exchange import exchange, slot_records
from optpass.runtime.folder import listed_components
from optpass.runtime.workfolder import WorkFolder, alone

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Refitted:
    """What :func:`refit` wrote: tensors and bytes, what is in the engine now, and what of the adapters is not."""

    bundle: Path
    seconds: float
    tensors: int
    bytes: int
    content: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "seconds": self.seconds,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "content": list(self.content),
            "left_out": [{"key": key, "reason": reason} for key, reason in self.left_out],
        }


def refit(
    bundle: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    component: str | None = None,
    strict: bool = True,
    out: Path | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> Refitted:
    """Put ``adapters`` with their strengths in place of those that are in ``bundle``; none restores the base weights.

    Written in place, the bundle changes as a whole or not at all; with ``out``, a copy is changed.

    Raises:
        UserError: the bundle keeps no exchangeable weights, an adapter does not fit them, or is damaged.
    """
    if out is not None:
        return _copied(
            bundle, out, lambda copy: refit(copy, adapters, component=component, strict=strict, progress=progress)
        )
    started = time.perf_counter()
    chosen = read_adapters(adapters)
    with alone(bundle):
        manifest = read_manifest(bundle)
        work = [_Work(bundle, manifest, part, chosen) for part in _parts(bundle, manifest, component)]
        for item in work:
            item.plan(strict, elsewhere=len(work) > 1)
        _refuse_idle(chosen, work)
        done = exchange(
            bundle,
            manifest,
            [(item.part, item.content) for item in work],
            list(map(str, chosen)),
            lambda fraction: progress("write the weights", fraction),
        )
    # What one part leaves to another is not left out.
    refused = [dict(item.notes) for item in work]
    left_out = tuple((key, reason) for key, reason in refused[0].items() if all(key in other for other in refused))
    seconds = time.perf_counter() - started
    return Refitted(bundle, seconds, done.tensors, done.bytes, done.content, left_out)


def _refuse_idle(chosen: Sequence[Chosen], work: Sequence[_Work]) -> None:
    """
    Raises:
        UserError: an adapter changes nothing of any part.
    """
    used = {id(found) for item in work for several in item.adaptations.values() for found, _ in several}
    for each in chosen:
        modules = each.adapter.modules.values()
        if not any(id(adaptation) in used for adaptation in modules):
            reason = next((reason for item in work for key, reason in item.notes if key == next(iter(modules)).key), "")
            raise UserError(f"{each.adapter.path} changes nothing of this bundle: {next(iter(modules)).key}: {reason}")


def _parts(bundle: Path, manifest: Manifest, component: str | None) -> list[PartRecord]:
    """The parts to change: the named one, or all that keep exchangeable weights."""
    if component is not None:
        return [manifest.part(component)]
    return [part for part in manifest.all_parts() if part.refit] or [manifest]


class _Work:
    """One part of the bundle: its slots, and what goes into them."""

    def __init__(self, bundle: Path, manifest: Manifest, part: PartRecord, chosen: Sequence[Chosen]) -> None:
        self.bundle, self.part, self.chosen = bundle, part, chosen
        self.components = _pipeline(bundle, manifest)
        self.slots = slot_records(bundle, manifest, part).slots(bundle / part.folder)
        self.shapes = _weight_shapes(self.slots)
        self.dtypes = {name: base.dtype for (name, _), base in self.slots.items()}
        self.adaptations: Mapping[str, Adaptations] = {}
        self.notes: list[tuple[str, str]] = []

    def plan(self, strict: bool, elsewhere: bool) -> None:
        """
        Raises:
            UserError: an adapter does not fit the slots, or (unless it may be ``elsewhere``) is of other components.
        """
        self.adaptations = plan_adapters(
            self.chosen,
            self._model(),
            strict=strict,
            elsewhere=elsewhere,
            note=lambda *note: self.notes.append(note),
        )
        for (name, role), base in self.slots.items():
            self.content(name, role, base)

    def content(self, name: str, role: str, base: Expression) -> Expression:
        return content_of(role, base, self.shapes[name], self.adaptations.get(name, ()))

    def _model(self) -> Adaptable:
        origin = self.part.origin
        component, module = belonging(
            str(origin.get("kind", "")), self.part.component, pipeline=bool(origin.get("pipeline"))
        )
        paths = {name.removesuffix(SUFFIX): name for name in self.shapes}
        return Adaptable(
            {path: Site(name, ()) for path, name in paths.items()},
            {name: Absent(name, shape, self.dtypes[name]) for name, shape in self.shapes.items()},
            component=component,
            components=self.components,
            module=module,
            layout=layout_paths(origin.get("config") or {}),
            absent="the bundle keeps no exchangeable weight of",
        )


def _pipeline(bundle: Path, manifest: Manifest) -> list[str]:
    """The components of the pipeline that the bundle is of, lowered or carried; empty where it is of none."""
    lowered = [part.component for part in manifest.all_parts() if part.origin.get("pipeline")]
    carried = bundle / manifest.components if manifest.components else None
    if carried is None or not (carried / PIPELINE_INDEX).is_file():
        return lowered
    return list(dict.fromkeys([*lowered, *listed_components(carried)]))


def _weight_shapes(slots: Mapping[tuple[str, str], Expression]) -> dict[str, Shape]:
    """The shapes of the weights that slots are about; of a branch, what its two layers make together."""
    shapes: dict[str, Shape] = {}
    for (name, role), base in slots.items():
        if role == MERGED:
            shapes[name] = base.shape
        elif role == DOWN:
            shapes[name] = (slots[name, UP].shape[0], *base.shape[1:])
    return shapes


def _copied(bundle: Path, out: Path, change: Callable[[Path], Refitted]) -> Refitted:
    """``change`` applied to a copy of ``bundle``, which appears under ``out`` only when it is done."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; choose another folder")
    if out.resolve().is_relative_to(bundle.resolve()):
        raise UserError(f"{out} is inside of {bundle}, of which it would be a copy; choose another folder")
    read_manifest(bundle)
    work = WorkFolder(out)
    try:
        work.make()
        copy = work.path / out.name
        with alone(bundle, shared=True):
            shutil.copytree(bundle, copy)
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
        done = change(copy)
        copy.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        work.remove()
    return replace(done, bundle=out)
