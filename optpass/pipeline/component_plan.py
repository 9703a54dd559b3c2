"""What applying a recipe to one component would do and take: nothing is executed, no weight value is read.

Structural passes are run, for they need shapes only, so the costs after each are the ones that the apply
will report. A pass that executes (calibration, training) is not run: what follows it is foreseen as though
it had changed no shape, and says so. Memory, disk, reading and work are worked out from the Programs:

- **Reading**: the bytes of the checkpoint's files that each stage goes through. What was read before comes
  from the page cache where the files fit into it.
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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from optpass.analysis.cost import Cost, measure
from optpass.analysis.evaluation import file_leaves, held_bytes, read_bytes
from optpass.errors import UserError
from optpass.evaluate.difference import TRIALS, program_calls
from optpass.evaluate.latency import RUNS, WARMUP
from optpass.evaluate.metrics import NUMERIC
from optpass.evaluate.trials import elements, trial_specs
from optpass.evaluate.walks import compared_calls, timed_length
from optpass.evaluate.widened import widened
from optpass.ir.loop import Loop
from optpass.ir.program import Program
from optpass.ir.slots import kept_bytes
from optpass.ir.weights import Expression
from optpass.pipeline import evidence, verification
from optpass.pipeline.gates import Gate, LatencyGate, MetricGate
from optpass.pipeline.manager import PassRecord, run_pass
from optpass.pipeline.passes import Pass
from optpass.pipeline.progress import Progress
from optpass.pipeline.recipe import Recipe, Step
from optpass.pipeline.request import Request
from optpass.pipeline.target import Footprint, Unsupported
from optpass.runtime.components import component_files
from optpass.runtime.sampling import asked_beside, can_sample

PROCESS = 380 << 20
NODE, NODE_REWRITTEN = 15 << 10, 25 << 10
"""Anonymous bytes of the process, of a captured node, and of a node of a pass's result."""
RECORDS = 28 << 10
"""Bytes of manifest, lock file and report, beside what the report says of every site."""
SITE = 220
CLIP = 5 << 10
"""Bytes of a generated sample of 8 frames of 32 × 32 pixels in the report."""


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
            "contract": str(self.step.record.promise),
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
    """One captured component. ``bundle`` and ``temporary`` are its bytes on disk; ``footprint`` is its engines'."""

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


def plan_component(
    recipe: Recipe,
    request: Request,
    program: Program,
    *,
    has_values: bool,
    lowers: bool,
    first: bool,
    progress: Progress,
) -> ComponentPlan:
    """Foresee what an apply does with ``program``, as it was captured, by the recipe as it stands for it alone.

    ``has_values`` may say so of weights that are not there; ``lowers`` is whether engines are made.
    Samples, which all components make together, are told of the ``first``.
    """
    planner = _Planner(recipe, request if first else replace(request, samples=0), program, progress)
    planner.has_values, planner.lowers = has_values and not request.structure_only, lowers
    return planner.plan()


class _Planner:
    """One Program on its way through the recipe."""

    def __init__(self, recipe: Recipe, request: Request, program: Program, progress: Progress) -> None:
        self.recipe, self.request, self.progress = recipe, request, progress
        self.original, self.has_values, self.lowers = program, program.has_values, True
        self.cost = measure(program)
        self.refusals: list[str] = []
        self.stages: list[Stage] = []
        self.held = PROCESS + NODE * _nodes(program)
        self.rewritten = 0
        self.seen: set[Expression] = set()

    def plan(self) -> ComponentPlan:
        if self.lowers and not self.recipe.target.structure_only and not self.has_values:
            self.refusals.append(
                f"{self.request.checkpoint} has no weights, and target {self.recipe.target_name!r} needs them; "
                "plan with --assume-weights, or apply with --structure-only"
            )
        self.stages.append(Stage("capture", memory=self.held))
        passes, result = self._passes()
        unsupported = tuple(self.recipe.target.refuses(result)) if self.lowers else ()
        if unsupported:
            self.refusals.append(
                f"target {self.recipe.target_name!r} cannot take {len(unsupported)} parts of the model"
            )
        footprint = self._footprint(result) if self.lowers else None
        collected, temporary = self._lower(result, footprint) if footprint else ("no engine, no evidence", 0)
        self._identify()
        samples = 2 * self.request.samples if self._sampled(collected) else 0
        sites = sum(len(item.record.sites) for item in passes if item.record)
        bundle = RECORDS + SITE * sites + CLIP * samples + (footprint.disk if footprint else 0)
        bundle += kept_bytes(result.used_weights())
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
            before = program
            item, after = self._pass(step, program, cost, tuple(unrun))
            found.append(item)
            if item.status == "not run":
                unrun.append(step.name)
            if item.record is not None:
                self._rewritten(step, after)
                self._verify(item, program, after)
                program, cost = after, item.record.after
            if item.status in ("run", "not run"):
                self._gates(step, before, program)
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
        reason = verification.skipped(self.request.verify, step.record.promise, cost, self.has_values)
        executed = f"not verified: {reason}" if reason else "executed before and after"
        if step.record.executing:
            if self.has_values:
                return PassPlan(step, "not run", needs, unrun, executed, "what it makes is known once it runs"), program
            note = f"pass {step.name!r} needs weight values; the checkpoint was captured structure-only"
            self.refusals.append(note)
            return PassPlan(step, "refused", needs, unrun, executed, note), program
        try:
            after, record = run_pass(program, step, cost, self.recipe.target)
        except UserError as error:
            if unrun:
                note = f"cannot be foreseen without what {', '.join(unrun)} makes: {error}"
                return PassPlan(step, "not run", needs, unrun, executed, note), program
            self.refusals.append(str(error))
            return PassPlan(step, "refused", needs, unrun, executed, str(error)), program
        if not reason and (resized := verification.resized_inputs(program, after)):
            executed = f"not verified: {resized}"
        elif not reason and not record.modified:
            executed = "nothing to verify: unmodified"
        return PassPlan(step, "run", needs, unrun, executed, record=record), after

    def _verify(self, item: PassPlan, before: Program, after: Program) -> None:
        assert item.record is not None
        if not item.verification.startswith("executed"):
            return
        # As the verification does: an exact pass promises more than half precision resolves.
        if item.step.record.promise.kind == "exact":
            before, after = widened(before, unrounded=True), widened(after, unrounded=True)
        self._compare(f"verify {item.step.name}", before, after)

    def _gates(self, step: Step, before: Program, after: Program) -> None:
        for gate in self.recipe.gates:
            if not gate.follows(step.name):
                continue
            name = f"gate {gate.title} after {step.name}"
            if reason := _gate_refusal(gate, self.original, self.has_values):
                self.refusals.append(f"gate {gate.title} after {step.name!r}: {reason}")
            elif isinstance(gate, LatencyGate):
                self._time(name, before, after, gate.latency.runs)
            elif isinstance(gate, MetricGate) and gate.metric in NUMERIC:
                self._compare(name, self.original, after)
            elif isinstance(gate, MetricGate):
                compared = (self.original, after) if gate.metric == "psnr" else (after,)
                macs = gate.clips * gate.steps * sum(_macs(each) for each in compared)
                self._execute(name, compared, Trials(1.0, 1.0), macs)

    def _time(self, name: str, before: Program, after: Program, runs: int) -> None:
        """A stage in which the engines of both Programs are written, loaded and called in turn."""
        read = self._read(before) + self._read(after)
        first, second = self._footprint(before), self._footprint(after)
        if first is None or second is None:
            return
        peak = first.loaded + max(second.lowering, second.checking, second.loaded)
        calls = (runs + WARMUP) * timed_length(after.loop)
        self.stages.append(Stage(name, calls * (_call_macs(before) + _call_macs(after)), read, self.held + peak))

    def _compare(self, name: str, before: Program, after: Program) -> None:
        """A stage in which both Programs are called on the same random inputs."""
        trials = Trials.of(before, TRIALS, after.loop)
        self._execute(name, (before, after), trials, round(trials.work * (_macs(before) + _macs(after))))

    def _execute(self, name: str, programs: Sequence[Program], trials: Trials, macs: int) -> None:
        """A stage in which PyTorch runs ``programs`` one after another."""
        read = sum(self._read(program) for program in programs)
        memory = max(_executed_bytes(program, trials.largest) for program in programs)
        self.stages.append(Stage(name, macs, read, self.held + memory))
        self.held += max(held_bytes(program.used_weights()) for program in programs)

    def _read(self, program: Program) -> int:
        """Bytes of files under the weights of ``program``, which are known by then."""
        weights = program.used_weights()
        self.seen |= file_leaves(weights)
        return read_bytes(weights)

    def _identify(self) -> None:
        """The checkpoint's digest reads what nothing else has read, such as weights that a pass dropped."""
        if not self.has_values:
            return
        unread = sum(leaf.nbytes for leaf in file_leaves(self.original.used_weights()) - self.seen)
        self.stages.append(Stage("identify the checkpoint", read=unread, memory=self.held))

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
        read = self._read(result) if self.has_values else 0
        self.stages.append(Stage("lower", read=read, memory=self.held + max(engine.lowering, engine.checking)))
        if self.recipe.target.runs() == "elsewhere":
            return f"not collected: engines of target {self.recipe.target_name!r} do not run here", 0
        if not self.has_values:
            return "not collected: captured structure-only", 0
        if reason := evidence.skipped(self.request.verify, self.cost.totals):
            return f"not collected: {reason}", 0
        before, after = _call_macs(self.original), _call_macs(result)
        self.held += engine.loaded
        trials, wide = Trials.of(self.original, 1, result.loop), widened(self.original)
        memory = self.held + _executed_bytes(wide, trials.largest)
        macs = round(trials.work * (before + after))
        self.stages.append(Stage("compare", macs, self._read(wide), memory))
        if not self.request.baseline:
            return "numerics", 0
        baseline = self.recipe.target.predict(self.original)
        self.held += held_bytes(wide.used_weights())
        peak = max(baseline.lowering, baseline.checking, baseline.loaded)
        self.stages.append(Stage("lower the original", read=self._read(self.original), memory=self.held + peak))
        self.held += baseline.loaded
        activations = max(self.cost.totals.peak_activation_bytes, measure(result).totals.peak_activation_bytes)
        calls = (RUNS + WARMUP) * timed_length(result.loop)
        self.stages.append(Stage("latency", calls * (before + after), 0, self.held + 2 * activations))
        if not self._sampled("numerics"):
            return "numerics and latency", baseline.disk
        asked = asked_beside(self.original.loop, result.loop, self.request.steps)
        macs = sum((how.steps or 0) * each for how, each in zip(asked, (before, after), strict=True))
        memory = self.held + 2 * activations + 2 * _carried_weights(self.original)
        self.stages.append(Stage("samples", self.request.samples * macs, 0, memory))
        return "numerics, latency and samples", baseline.disk

    def _sampled(self, collected: str) -> bool:
        origin = self.original.origin
        wanted = collected.startswith("numerics") and self.request.baseline and self.request.samples > 0
        return wanted and origin.pipeline and can_sample(origin.path)


@dataclass(frozen=True)
class Trials:
    """Calls on random inputs: the work of all and the size of the largest beside the captured inputs.

    Open dimensions are tried at the ends of their ranges as well; what a call takes goes with its inputs' elements.
    """

    work: float
    largest: float

    @staticmethod
    def of(program: Program, trials: int, loop: Loop | None) -> Trials:
        """Those of every call of ``program`` together, where what it is compared with is driven by ``loop``."""
        ratios: list[float] = []
        steps, calls = compared_calls(loop), program_calls(program)
        for call in calls.values():
            specs = trial_specs(call, call.dimensions, trials if steps == 1 else 1)
            ratios += [elements(each) / max(elements(specs[0]), 1) for each in specs]
        return Trials(steps * sum(ratios) / max(len(calls), 1), max(ratios, default=1.0))


def _needs(record: Pass) -> tuple[str, ...]:
    """What a pass takes beside shapes."""
    needs = [record.needs or "weight values"] if record.executing else []
    if record.heals:
        needs.append("training")
    if record.promise.kind == "retrain":
        needs.append("a healing pass after it")
    return tuple(needs)


def _nodes(program: Program) -> int:
    return sum(len(graph.fx.nodes) for graph in program.entries.values())


def _macs(program: Program) -> int:
    return measure(program).totals.macs


def _call_macs(program: Program) -> int:
    """Of a call of the loop, or of the first entry."""
    cost = measure(program)
    return cost.totals.macs if program.loop else next(iter(cost.entries.values())).totals.macs


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
    if not isinstance(gate, MetricGate) or gate.metric in NUMERIC:
        return ""
    origin = program.origin
    if not origin.pipeline or origin.path is None:
        return "quality metrics need a checkpoint that is a pipeline folder"
    if not can_sample(origin.path):
        return "optpass cannot generate samples with this pipeline"
    if gate.metric != "psnr" and not (origin.path / "evaluator").is_dir():
        return f"the checkpoint has no evaluator/ folder, which {gate.metric} needs"
    return ""
