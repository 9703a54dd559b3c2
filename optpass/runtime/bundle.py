"""The bundle: a folder of engines with ``manifest.json``, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel

from optpass import __version__
from optpass.errors import UserError, nearest
from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import TensorSpec
from optpass.ir.guards import Guard, identifier
from optpass.ir.hashing import file_digest
from optpass.ir.interface import Interface
from optpass.ir.loop import Loop, single_step, usual_steps
from optpass.ir.loop_legality import loop_problems
from optpass.ir.program import InputRange, Program
from optpass.ir.signature import Signature
from optpass.ir.weights import dtype_from_name
from optpass.pipeline.options import validated
from optpass.pipeline.target import LoweredEntry
from optpass.runtime.components import component_files, copy_components
from optpass.runtime.workfolder import WorkFolder

MANIFEST = "manifest.json"
COMPONENTS = "components"
REFIT = "refit"
SLOTS_FILE = ".slots.data"
SCHEMA = 4
Verified = Literal["numerics", "compiled-only"]
STEPS = 20
"""Sampling steps where neither the user nor the bundle says how many."""


class FileRecord(BaseModel):
    """A file of the bundle as it was written."""

    sha256: str
    bytes: int


class TensorRecord(BaseModel):
    """Name, shape (open sizes by name) and dtype (``f32``, ``i64`` …) of an engine's input or output."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def spec(self) -> TensorSpec:
        """As the IR has it.

        Raises:
            UserError: the dtype is unknown.
        """
        return TensorSpec(self.name, self.shape, dtype_from_name(self.dtype))


class EntryRecord(BaseModel):
    """One engine: its main file, its flat tensors, and the call around them."""

    engine: str
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    signature: dict[str, Any]
    dimensions: dict[str, Any] | None = None
    details: dict[str, Any] = {}

    def open_dimensions(self) -> Dimensions:
        """The ranges of the sizes that calls may choose, and the guards between them.

        Raises:
            UserError: the record is damaged.
        """
        try:
            found = Dimensions.from_json(self.dimensions) if self.dimensions else FIXED
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the dimensions of {self.engine} are damaged: {error!r}") from error
        known = {identifier(name) for name in found.by_name}
        for record in self.inputs:
            for size in record.shape:
                if isinstance(size, str) and size not in found.by_name and not Guard(size).names <= known:
                    raise UserError(f"the dimensions of {self.engine} are damaged: {size!r} has no range")
        return found

    def interface(self) -> Interface:
        """What it takes and gives.

        Raises:
            UserError: the record is damaged.
        """
        return Interface(
            tuple(record.spec() for record in self.inputs),
            tuple(record.spec() for record in self.outputs),
            self.open_dimensions(),
        )

    def call(self) -> Signature:
        """The captured module's call.

        Raises:
            UserError: the record is damaged.
        """
        try:
            return Signature.from_json(self.signature)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the signature of {self.engine} is damaged: {error!r}") from error


class TargetRecord(BaseModel):
    """The target that lowered and loads the engines, and its options."""

    name: str
    options: dict[str, Any] = {}


class RangeRecord(BaseModel):
    """What random values of an input may be."""

    low: float
    high: float
    distribution: str


class PartRecord(BaseModel):
    """One lowered Program. Its entries' files are relative to ``folder``, which is relative to the bundle.

    ``refit`` is the folder, relative to ``folder``, of the records of weights that can be exchanged. ``verified``
    says whether the engines were executed and compared with the original, or only compiled; bundles of older
    versions do not say.
    """

    target: TargetRecord
    entries: dict[str, EntryRecord]
    loop: dict[str, Any] | None = None
    ranges: dict[str, RangeRecord] = {}
    origin: dict[str, Any] = {}
    folder: str = "."
    refit: str | None = None
    verified: Verified | None = None

    @property
    def component(self) -> str:
        """The pipeline's name of the component; empty for a model alone."""
        return str(self.origin.get("component", ""))

    def input_ranges(self) -> dict[str, InputRange]:
        """The captured ranges, by input name."""
        return {name: InputRange(span.low, span.high, span.distribution) for name, span in self.ranges.items()}

    @property
    def interfaces(self) -> dict[str, Interface]:
        """What every entry takes and gives.

        Raises:
            UserError: a record is damaged.
        """
        return {name: entry.interface() for name, entry in self.entries.items()}

    def driven(self) -> Loop | None:
        """The loop that runs the entries, if they are a sampled model's.

        Raises:
            UserError: the record is damaged, or what it says of the entries is not legal.
        """
        if self.loop is None:
            return None
        try:
            if "entry" in self.loop:
                # Schemas 1 and 2 knew loops of one entry.
                name = str(self.loop["entry"])
                return single_step(name, self.entries[name].call())
            loop = Loop.from_json(self.loop)
            problems = loop_problems(loop, self.interfaces)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the loop of {self.component or 'the model'} is damaged: {error!r}") from error
        if problems:
            raise UserError(f"the loop of {self.component or 'the model'} is damaged: {'; '.join(problems)}")
        return loop

    def engine_files(self) -> list[str]:
        """The entries' main files, relative to the bundle."""
        folder = PurePosixPath(self.folder)
        return [(folder / entry.engine).as_posix() for entry in self.entries.values()]


class Manifest(PartRecord):
    """``manifest.json``: the main Program (a pipeline's denoiser) and ``parts``, a pipeline's other lowered components.

    ``components`` is the folder of everything that is carried as it is, relative to the bundle; ``call`` are
    arguments of the pipeline's call that the engines' sizes belong to.
    """

    schema_version: int
    optpass: str
    parts: list[PartRecord] = []
    components: str | None = None
    call: dict[str, Any] = {}
    files: dict[str, FileRecord]

    def all_parts(self) -> list[PartRecord]:
        """The main part and the others."""
        return [self, *self.parts]

    @property
    def usual_steps(self) -> int:
        """Sampling steps where nobody says how many: those that the schedule or the model was made for."""
        return usual_steps(self.driven(), STEPS)

    def part(self, component: str | None) -> PartRecord:
        """The part of a component; ``None`` for the main one.

        Raises:
            UserError: the bundle has no engine of it.
        """
        if component is None:
            return self
        names = [part.component for part in self.all_parts()]
        for part in self.all_parts():
            if part.component == component:
                return part
        raise UserError(f"the bundle has no engine of {component!r}{nearest(component, names)}")


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of ``bundle``; every path in it stays inside the folder.

    Raises:
        UserError: there is no bundle, its manifest is damaged, newer than this optpass, or leaves the folder.
    """
    path = bundle / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{bundle} is no bundle: cannot read {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not valid JSON ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise UserError(f"{path} is no manifest of optpass: it has no schema_version")
    if version > SCHEMA:
        raise UserError(f"{path} has schema {version}, and this optpass reads up to {SCHEMA}: install a newer optpass")
    manifest = validated(Manifest, data, f"{path} is damaged")
    for name in [*manifest.files, *(name for part in manifest.all_parts() for name in part.engine_files())]:
        file_inside(bundle, name)
    if manifest.components is not None:
        file_inside(bundle, manifest.components)
    for part in manifest.all_parts():
        if part.entries:
            part.driven()
    return manifest


def file_inside(bundle: Path, name: str) -> Path:
    """``bundle / name``, where ``name`` came from a manifest.

    Raises:
        UserError: it is absolute, climbs out, or is a link to a place outside of the bundle.
    """
    home = bundle.resolve()
    try:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts and "\\" not in name
        inside = inside and bool(name) and (home / name).resolve().is_relative_to(home)
    except (OSError, ValueError):
        inside = False
    if not inside:
        raise UserError(f"{bundle / MANIFEST} names {name!r}, which is outside the bundle; refused")
    return bundle / name


def verify_files(bundle: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded size and hash.

    Raises:
        UserError: a file is missing or changed, or an engine has no hash.
    """
    for engine in (name for part in manifest.all_parts() for name in part.engine_files()):
        if engine not in manifest.files:
            raise UserError(f"{bundle / MANIFEST} is damaged: it has no hash of the engine {engine}")
    for name, record in manifest.files.items():
        path = file_inside(bundle, name)
        if not path.is_file():
            raise UserError(f"{bundle} is damaged: {name} is missing")
        if path.stat().st_size != record.bytes or file_digest(path) != record.sha256:
            refit = f"{REFIT}/" in name or path.name.endswith(SLOTS_FILE)
            hint = "; if an exchange of adapters was cut short, run optpass refit again" if refit else ""
            raise UserError(f"{bundle} is damaged: {name} is not the file that was written (its hash differs){hint}")


class BundleWriter:
    """Context in which a bundle is written to a hidden sibling of ``out`` and renamed at the end.

    Write into :attr:`folder`, then call :meth:`finish`. However the context is left, ``out`` is either
    the finished bundle or what it was before; the sibling is gone. Those of killed processes go with the
    next writer for the same ``out``.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        self.out = out
        self.force = force
        self._work = WorkFolder(out)
        self.folder = self._work.path
        self._aside = self.folder.with_name(f".{Path(os.path.abspath(out)).name}.replaced-{self._work.token}")
        self._expected = 0
        self._finished = False

    def __enter__(self) -> Self:
        """
        Raises:
            UserError: ``out`` exists and may not be replaced, or nothing can be written there.
        """
        self.refuse_existing()
        try:
            self._work.make()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder.parent}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """
        Raises:
            UserError: the disk ran full, or ``out`` appeared meanwhile.
        """
        try:
            if error is None:
                assert self._finished, "BundleWriter.finish was not called"
                self._commit()
        finally:
            written = _size(self.folder) if error is not None and _is_full(error) else 0
            self._work.remove()
            if error is not None and _is_full(error):
                raise self._full(max(written, self._expected)) from error

    def reserve(self, program: Program, *others: Program) -> None:
        """Refuse now what cannot fit: the weights and the pipeline's other components.

        Raises:
            UserError: the disk has less space than they take.
        """
        programs = (program, *others)
        parts = component_files(program.origin, _names(programs)).values()
        weights = (expression for each in programs for expression in each.used_weights().values())
        used = sum(expression.nbytes for expression in weights if expression.has_values)
        self._expected = used + sum(path.stat().st_size for path in parts)
        if shutil.disk_usage(self.folder.parent).free < self._expected:
            raise self._full(self._expected)

    def finish(
        self,
        *,
        program: Program,
        target: str,
        options: Mapping[str, Any],
        engines: Mapping[str, LoweredEntry],
        folder: str = ".",
        parts: Sequence[PartRecord] = (),
        call: Mapping[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
        verified: Verified | None = None,
    ) -> Manifest:
        """Add the pipeline's other components and the manifest, with a hash of every file in :attr:`folder`.

        Files that were hashed as they were written are not read again. With no ``engines`` (structure
        only) the bundle is a report. ``parts`` are the records of further Programs of the pipeline, each
        lowered into a folder of its own; ``folder`` is that of ``program``, ``digests`` are hashes of files
        of ``parts`` by their paths in the bundle.
        """
        digests = engine_digests(engines, folder) | dict(digests or {})
        components = next(
            (entry.details["components"] for entry in engines.values() if "components" in entry.details), None
        )
        optimised = {program.origin.component, *(part.component for part in parts)}
        if components is None and engines and component_files(program.origin, optimised):
            components = COMPONENTS
            copied = copy_components(program.origin, self.folder / COMPONENTS, optimised)
            digests |= {f"{COMPONENTS}/{name}": digest for name, digest in copied.items()}
        main = part_record(program, target, options, engines, folder, verified)
        manifest = Manifest(
            **dict(main),
            schema_version=SCHEMA,
            optpass=__version__,
            parts=list(parts),
            components=components,
            call=dict(call or {}),
            files=_records(self.folder, digests),
        )
        (self.folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        self._finished = True
        return manifest

    def refuse_existing(self) -> None:
        """
        Raises:
            UserError: ``out`` exists and may not be replaced.
        """
        if not (self.out.exists() or self.out.is_symlink()):
            return
        if not self.force:
            raise UserError(f"{self.out} exists; choose another folder, or pass --force to replace it")
        if self.out.is_symlink() or not self.out.is_dir() or not _replaceable(self.out):
            raise UserError(f"{self.out} is not a bundle of optpass and will not be replaced; choose another folder")

    def _commit(self) -> None:
        self.refuse_existing()
        if not self.out.exists():
            self.folder.rename(self.out)
            return
        self.out.rename(self._aside)
        try:
            self.folder.rename(self.out)
        except BaseException:
            self._aside.rename(self.out)
            raise
        shutil.rmtree(self._aside, ignore_errors=True)

    def _full(self, needed: int) -> UserError:
        free = shutil.disk_usage(self.folder.parent).free
        return UserError(
            f"no space for {self.out}: it needs {needed:,} bytes or more, and the disk has {free:,} free; "
            "nothing was left behind"
        )


def engine_digests(engines: Mapping[str, LoweredEntry], folder: str) -> dict[str, str]:
    """Hashes of engines' files that were taken as they were written, by their paths in the bundle."""
    place = PurePosixPath(folder)
    return {(place / name).as_posix(): value for engine in engines.values() for name, value in engine.digests.items()}


def part_record(
    program: Program,
    target: str,
    options: Mapping[str, Any],
    engines: Mapping[str, LoweredEntry],
    folder: str,
    verified: Verified | None = None,
) -> PartRecord:
    """The record of ``program``, lowered to ``engines`` in ``folder`` of the bundle."""
    return PartRecord(
        target=TargetRecord(name=target, options=dict(options)),
        entries={name: _entry(program, name, engine) for name, engine in engines.items()},
        loop=program.loop.as_json() if program.loop else None,
        ranges={name: RangeRecord(**span.as_json()) for name, span in program.ranges.items()},
        origin=program.origin.as_json(),
        folder=folder,
        refit=REFIT if any(engine.slotted for engine in engines.values()) else None,
        verified=verified,
    )


def _names(programs: Sequence[Program]) -> list[str]:
    return [program.origin.component for program in programs]


def _entry(program: Program, name: str, engine: LoweredEntry) -> EntryRecord:
    return EntryRecord(
        engine=engine.main,
        inputs=[TensorRecord(**spec.as_json()) for spec in engine.inputs],
        outputs=[TensorRecord(**spec.as_json()) for spec in engine.outputs],
        signature=program.entries[name].signature.as_json(),
        dimensions=program.entries[name].dimensions.as_json() if program.entries[name].dimensions else None,
        details=engine.facts(),
    )


def _records(folder: Path, digests: Mapping[str, str]) -> dict[str, FileRecord]:
    records = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        name = path.relative_to(folder).as_posix()
        records[name] = FileRecord(sha256=digests.get(name) or file_digest(path), bytes=path.stat().st_size)
    return records


def _replaceable(folder: Path) -> bool:
    """Whether ``folder`` is empty or was written by optpass; a ``manifest.json`` alone may be anybody's."""
    if not any(folder.iterdir()):
        return True
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema_version", "optpass", "files"} <= found.keys()


def _is_full(error: BaseException | None) -> bool:
    seen: set[int] = set()
    # A chain of causes can be a circle: nothing forbids ``raise cause from error``.
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
