"""What applying a recipe would do and take, foreseen: nothing is executed, no weight value is read.

Structural passes are run, for they need shapes only, so the costs after each are the ones that the apply
will report. A pass that executes (calibration, training) is not run: what follows it is foreseen as though
it had changed no shape, and says so. Memory, disk, reading and work are worked out from the Programs:

- **Reading**: the bytes of the checkpoint's files that each stage goes through. The first stage hashes
  whole files; what later stages read comes from the page cache where the files fit into it.
- **Work**: MACs of each stage that executes the model; seconds at the rate of a matrix product on
  this machine, which no model reaches, so they are a lower bound.
- **Disk**: the target's files, the pipeline's other components, and the records. Where evidence is
  collected, the target's files of the original besides, in the system's folder for temporary files.
- **Memory**: anonymous memory (RssAnon), for mapped pages of files are the kernel's to drop. It is the
  worst of these stages, each on top of what those before it left behind:

  ====================  ==================================================================================
  capture               :data:`PROCESS` for Python, PyTorch, diffusers and transformers, then
                        :data:`NODE` for each node
  a pass                :data:`NODE_REWRITTEN` for each node of its result; the next pass takes the same
  verify, gate          the worse Program's computed weights (stored ones are mapped), those of 16 bits
                        twice, for the CPU's kernels convert them; and its peak activations. The allocator
                        keeps the computed weights' pages
  lower                 what the target foresees for its files (:meth:`Target.predict`)
  evidence              both engines, and the original executed by PyTorch as under verify
  samples               the pipeline's other components, read into memory for each of the two engines
  ====================  ==================================================================================

The constants were fitted on Linux with Python 3.11, PyTorch 2.13 and ONNX Runtime 1.31, one thread, to
models of 10 to 600 MB and 100 to 4,000 nodes; ``tests/pipeline/test_plan.py`` holds them to real runs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from optpass.analysis.cost import Cost, measure
from optpass.analysis.evaluation import held_bytes, read_bytes
from optpass.capture.digest import weight_files
from optpass.errors import UserError
from optpass.evaluate.difference import TRIALS, elements, trial_specs
from optpass.evaluate.latency import RUNS, WARMUP
from optpass.evaluate.metrics import NUMERIC
from optpass.ir.program import Program
from optpass.pipeline import evidence, verification
from optpass.pipeline.apply import captured
from optpass.pipeline.gates import Gate
from optpass.pipeline.manager import PassRecord, run_pass
from optpass.pipeline.passes import Pass
from optpass.pipeline.recipe import Recipe, Step
from optpass.pipeline.request import Progress, Request
from optpass.pipeline.target import Footprint, Unsupported
from optpass.runtime.bundle import BundleWriter
from optpass.runtime.components import component_files
from optpass.runtime.sampling import can_sample

SCHEMA = 1
PROCESS = 380 << 20
NODE, NODE_REWRITTEN = 15 << 10, 25 << 10
"""Anonymous bytes of the process, of a captured node, and of a node of a pass's result."""
RECORDS = 28 << 10
"""Bytes of manifest, lock file and report, beside what the report says of every site."""
SITE = 220
CLIP = 5 << 10
"""Bytes of a generated sample of 8 frames of 32 × 32 pixels in the report."""
NOWHERE = Path()
"""As ``Request.out``: no bundle is named yet, only the filesystem that it would lie on."""


@dataclass(frozen=True)
class PassPlan:
    """One pass of the recipe. ``record`` is what it did, where it could be run; ``note`` why not, or why refused.

    ``needs`` is what it takes beside shapes, ``assumes`` the passes before it that were not run, and
    ``verification`` whether the apply will execute the Program before and after it.
    """

    step: Step
    status: Literal["run", "not run", "refused", "not reached"]
    needs: tuple[str, ...]
    assumes: tuple[str, ...]
    verification: str
    note: str = ""
    record: PassRecord | None = None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.step.name,
            "contract": str(self.step.record.contract),
            "status": self.status,
            "needs": list(self.needs),
            "assumes": list(self.assumes),
            "verification": self.verification,
            "note": self.note,
        }
        if self.record is None:
            return {**found, "modified": None, "sites": None, "declined": None, "after": None}
        record = self.record.as_json()
        return {**found, **{key: record[key] for key in ("modified", "sites", "declined", "after")}}


@dataclass(frozen=True)
class Stage:
    """Something that the apply does: MACs it executes, bytes of the checkpoint it reads, bytes of memory at most."""

    name: str
    macs: int = 0
    read: int = 0
    memory: int = 0


@dataclass(frozen=True)
class ComponentPlan:
    """One captured component. ``bundle`` and ``temporary`` are bytes on disk; ``footprint`` is its engines'."""

    program: Program
    cost: Cost
    result: Program
    passes: tuple[PassPlan, ...]
    unsupported: tuple[Unsupported, ...]
    footprint: Footprint | None
    evidence: str
    stages: tuple[Stage, ...]
    bundle: int
    temporary: int
    refusals: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        origin = self.program.origin.as_json()
        return {
            "checkpoint": {key: origin[key] for key in ("name", "kind", "class", "component", "pipeline")},
            "has_weights": self.program.has_values,
            "entries": {
                name: {
                    "nodes": len(graph.calls),
                    "inputs": [spec.as_json() for spec in graph.inputs],
                    "outputs": [spec.as_json() for spec in graph.outputs],
                    "dimensions": [item.as_json() for item in graph.dimensions],
                }
                for name, graph in self.program.entries.items()
            },
            "before": self.cost.as_json(),
            "passes": [item.as_json() for item in self.passes],
            "unsupported": [asdict(item) for item in self.unsupported],
            "engines": asdict(self.footprint) if self.footprint else None,
            "evidence": self.evidence,
            "stages": [asdict(stage) for stage in self.stages],
            "disk": {"bundle": self.bundle, "temporary": self.temporary},
        }


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
        _Planner(recipe, request, program, program.has_values or assume_weights, lowers, progress).plan()
        for program in programs
    )
    refusals += [reason for part in parts for reason in part.refusals]
    found = Plan(recipe, parts, (), (), _macs_per_second(), _free(request.out), request.command)
    refusals += _disk_refusals(found, request)
    return replace(found, refusals=tuple(refusals), warnings=tuple(_warnings(found)))


class _Planner:
    """One Program on its way through the recipe."""

    def __init__(
        self, recipe: Recipe, request: Request, program: Program, has_values: bool, lowers: bool, progress: Progress
    ) -> None:
        self.recipe, self.request, self.progress = recipe, request, progress
        self.original, self.has_values, self.lowers = program, has_values and not request.structure_only, lowers
        self.cost = measure(program)
        self.refusals: list[str] = []
        self.stages: list[Stage] = []
        self.held = PROCESS + NODE * _nodes(program)
        self.rewritten = 0

    def plan(self) -> ComponentPlan:
        if self.lowers and not self.recipe.target.structure_only and not self.has_values:
            self.refusals.append(
                f"{self.request.checkpoint} has no weights, and target {self.recipe.target_name!r} needs them; "
                "plan with --assume-weights, or apply with --structure-only"
            )
        self.stages.append(Stage("capture", memory=self.held))
        if self.original.has_values:
            files = sum(path.stat().st_size for path in weight_files(self.original))
            self.stages.append(Stage("hash the checkpoint", read=files, memory=self.held))
        passes, result = self._passes()
        unsupported = tuple(self.recipe.target.supports(result)) if self.lowers else ()
        if unsupported:
            self.refusals.append(f"target {self.recipe.target_name!r} cannot take {len(unsupported)} operators")
        footprint = self._footprint(result) if self.lowers else None
        collected, temporary = self._lower(result, footprint) if footprint else ("no engine, no evidence", 0)
        samples = 2 * self.request.samples if self._sampled(collected) else 0
        sites = sum(len(item.record.sites) for item in passes if item.record)
        carried = sum(path.stat().st_size for path in component_files(self.original.origin).values())
        bundle = RECORDS + SITE * sites + CLIP * samples + (footprint.disk + carried if footprint else 0)
        return ComponentPlan(
            self.original,
            self.cost,
            result,
            passes,
            unsupported,
            footprint,
            collected,
            tuple(self.stages),
            bundle,
            temporary,
            tuple(self.refusals),
        )

    def _passes(self) -> tuple[tuple[PassPlan, ...], Program]:
        program, cost, found, unrun = self.original, self.cost, list[PassPlan](), list[str]()
        for step in self.recipe.steps:
            self.progress(step.name, 0.0)
            if found and found[-1].status in ("refused", "not reached"):
                found.append(PassPlan(step, "not reached", _needs(step.record), tuple(unrun), "not reached"))
                continue
            item, after = self._pass(step, program, cost, tuple(unrun))
            found.append(item)
            if item.status == "not run":
                unrun.append(step.name)
            if item.record is not None:
                self._rewritten(step, after)
                self._verify(item, program, after)
                program, cost = after, item.record.after
            if item.status in ("run", "not run"):
                self._gates(step, program)
            self.progress(step.name, 1.0)
        return tuple(found), program

    def _rewritten(self, step: Step, after: Program) -> None:
        """A copy edited, written as text and inferred again; what one pass took, the next one takes again."""
        size = NODE_REWRITTEN * _nodes(after)
        self.held += max(0, size - self.rewritten)
        self.rewritten = max(size, self.rewritten)
        self.stages.append(Stage(step.name, memory=self.held))

    def _pass(self, step: Step, program: Program, cost: Cost, unrun: tuple[str, ...]) -> tuple[PassPlan, Program]:
        needs = _needs(step.record)
        reason = verification.skipped(self.request.verify, step.record.contract, cost, self.has_values)
        executed = f"not verified: {reason}" if reason else "executed before and after"
        if step.record.executes:
            if self.has_values:
                return PassPlan(step, "not run", needs, unrun, executed, "what it makes is known once it runs"), program
            note = f"pass {step.name!r} needs weight values; the checkpoint was captured structure-only"
            self.refusals.append(note)
            return PassPlan(step, "refused", needs, unrun, executed, note), program
        try:
            after, record = run_pass(program, step, cost)
        except UserError as error:
            if unrun:
                note = f"cannot be foreseen without what {', '.join(unrun)} makes: {error}"
                return PassPlan(step, "not run", needs, unrun, executed, note), program
            self.refusals.append(str(error))
            return PassPlan(step, "refused", needs, unrun, executed, str(error)), program
        if not reason and not record.modified:
            executed = "nothing to verify: unmodified"
        return PassPlan(step, "run", needs, unrun, executed, record=record), after

    def _verify(self, item: PassPlan, before: Program, after: Program) -> None:
        assert item.record is not None
        if not item.verification.startswith("executed"):
            return
        self._compare(f"verify {item.step.name}", before, after)

    def _gates(self, step: Step, program: Program) -> None:
        for gate in self.recipe.gates:
            if gate.after != step.name:
                continue
            if reason := _gate_refusal(gate, self.original, self.has_values):
                self.refusals.append(f"gate {gate.metric} after {gate.after!r}: {reason}")
                continue
            name = f"gate {gate.metric} after {gate.after}"
            if gate.metric in NUMERIC:
                self._compare(name, self.original, program)
                continue
            compared = (self.original, program) if gate.metric == "psnr" else (program,)
            macs = gate.clips * gate.steps * sum(_macs(each) for each in compared)
            self._execute(name, compared, Trials(1, 1.0, 1.0), macs)

    def _compare(self, name: str, before: Program, after: Program) -> None:
        """A stage in which both Programs are called on the same random inputs, their weights read for every call."""
        trials = Trials.of(before, TRIALS)
        self._execute(name, (before, after), trials, round(trials.work * (_macs(before) + _macs(after))))

    def _execute(self, name: str, programs: Sequence[Program], trials: Trials, macs: int) -> None:
        """A stage in which PyTorch runs ``programs`` one after another."""
        read = trials.count * sum(read_bytes(program.used_weights()) for program in programs)
        memory = max(_executed_bytes(program, trials.largest) for program in programs)
        self.stages.append(Stage(name, macs, read, self.held + memory))
        self.held += max(held_bytes(program.used_weights()) for program in programs)

    def _footprint(self, program: Program) -> Footprint | None:
        try:
            found = self.recipe.target.predict(program)
        except UserError as error:
            self.refusals.append(str(error))
            return None
        if self.has_values:
            return found
        absent = sum(item.nbytes for item in program.used_weights().values() if not item.has_values)
        return replace(found, disk=found.disk - absent)

    def _lower(self, result: Program, engine: Footprint) -> tuple[str, int]:
        """Stages of writing the engines and of the evidence; whether that is collected, and its temporary bytes."""
        read = read_bytes(result.used_weights()) if self.has_values else 0
        self.held += engine.lowering
        self.stages.append(Stage("lower", read=read, memory=self.held + engine.checking))
        if not type(self.recipe.target).runs_here:
            return f"not collected: engines of target {self.recipe.target_name!r} do not run here", 0
        if not self.has_values:
            return "not collected: captured structure-only", 0
        if reason := evidence.skipped(self.request.verify, self.cost.totals):
            return f"not collected: {reason}", 0
        entry = self.original.loop.entry if self.original.loop else next(iter(self.original.entries))
        before, after = _entry_macs(self.original, entry), _entry_macs(result, entry)
        self.held += engine.loaded
        original = self.original.used_weights()
        trials = Trials.of(self.original, 1)
        memory = self.held + _executed_bytes(self.original, trials.largest)
        macs = round(trials.work * (before + after))
        self.stages.append(Stage("compare", macs, read_bytes(original), memory))
        if not self.request.baseline:
            return "numerics", 0
        baseline = self.recipe.target.predict(self.original)
        self.held += held_bytes(original) + baseline.lowering
        peak = max(baseline.checking, baseline.loaded)
        self.stages.append(Stage("lower the original", read=read_bytes(original), memory=self.held + peak))
        self.held += baseline.loaded
        activations = max(self.cost.totals.peak_activation_bytes, measure(result).totals.peak_activation_bytes)
        calls = RUNS + WARMUP
        self.stages.append(Stage("latency", calls * (before + after), 0, self.held + 2 * activations))
        if not self._sampled("numerics"):
            return "numerics and latency", baseline.disk
        calls = self.request.samples * self.request.steps
        memory = self.held + 2 * activations + 2 * _carried_weights(self.original)
        self.stages.append(Stage("samples", calls * (before + after), 0, memory))
        return "numerics, latency and samples", baseline.disk

    def _sampled(self, collected: str) -> bool:
        origin = self.original.origin
        wanted = collected.startswith("numerics") and self.request.baseline and self.request.samples > 0
        return wanted and origin.pipeline and can_sample(origin.path)


@dataclass(frozen=True)
class Trials:
    """Calls on random inputs: how many, and the work of all and the size of the largest beside the captured inputs.

    Open dimensions are tried at the ends of their ranges as well; what a call takes goes with its inputs' elements.
    """

    count: int
    work: float
    largest: float

    @staticmethod
    def of(program: Program, trials: int) -> Trials:
        """Those of every entry together."""
        ratios: list[float] = []
        count = 0
        for graph in program.entries.values():
            specs = trial_specs(graph, graph.dimensions, trials)
            count = max(count, len(specs))
            ratios += [elements(each) / max(elements(specs[0]), 1) for each in specs]
        return Trials(count, sum(ratios) / max(len(program.entries), 1), max(ratios, default=1.0))


def _needs(record: Pass) -> tuple[str, ...]:
    """What a pass takes beside shapes."""
    needs = [record.needs or "weight values"] if record.executes else []
    if record.heals:
        needs.append("training")
    if record.contract.kind == "retrain":
        needs.append("a healing pass after it")
    return tuple(needs)


def _nodes(program: Program) -> int:
    return sum(len(graph.fx.nodes) for graph in program.entries.values())


def _macs(program: Program) -> int:
    return measure(program).totals.macs


def _entry_macs(program: Program, entry: str) -> int:
    return measure(program).entries[entry].totals.macs


def _executed_bytes(program: Program, larger: float) -> int:
    """Memory of ``program`` run by PyTorch on ``larger`` inputs: computed weights, 16-bit ones twice, activations."""
    weights = program.used_weights()
    narrow = {name: item for name, item in weights.items() if item.dtype.itemsize == 2}
    narrow_bytes = sum(item.nbytes for item in narrow.values())
    return held_bytes(weights) + narrow_bytes + round(larger * measure(program).totals.peak_activation_bytes)


def _carried_weights(program: Program) -> int:
    """Bytes of the pipeline's other components, which sampling loads in float32."""
    files = component_files(program.origin).values()
    return sum(path.stat().st_size for path in files if path.suffix == ".safetensors")


def _gate_refusal(gate: Gate, program: Program, has_values: bool) -> str:
    if not has_values:
        return "needs weight values; the checkpoint was captured structure-only"
    if gate.metric in NUMERIC:
        return ""
    origin = program.origin
    if not origin.pipeline or origin.path is None:
        return "quality metrics need a checkpoint that is a pipeline folder"
    if not can_sample(origin.path):
        return "optpass cannot generate samples with this pipeline"
    if gate.metric != "psnr" and not (origin.path / "evaluator").is_dir():
        return f"the checkpoint has no evaluator/ folder, which {gate.metric} needs"
    return ""


def _refusal(check: Any) -> str:
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
