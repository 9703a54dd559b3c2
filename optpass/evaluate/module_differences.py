"""``optpass compare --modules``: how far every module departs, from the checkpoint through the passes to the engine.

The Program that was lowered is made again from the bundle's lock file. A copy of it returns what its modules return
besides, and is run three times on the same tensors: by PyTorch, by ONNX Runtime without its own optimisations, and,
lowered by the bundle's target, as the engine. Values are matched with those of the checkpoint's own Program by module
path, entry by entry, step by step of a walk through the schedule.

A probe is an output, and what is an output is not fused away: the engine that is looked at may have fewer fusions
than the one in the bundle.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from optpass.errors import UserError
from optpass.evaluate.difference import EQUAL, Difference, program_calls, program_runners, tensor_difference
from optpass.evaluate.replay import Replayed, replay
from optpass.evaluate.walks import timed_calls
from optpass.evaluate.widened import widened
from optpass.ir.program import Program
from optpass.pipeline.lowered import lowered_runners
from optpass.pipeline.progress import Progress
from optpass.pipeline.target import Runner
from optpass.pipeline.verification import resized_inputs
from optpass.rewrite.probes import Choice, Probe, choice_of, probed
from optpass.runtime.loop import call_runners

REFERENCE, OPTIMISED, ONNX, ENGINE = "checkpoint", "optimised", "ONNX", "engine"
BOUND, DROP = 40.0, 20.0
"""Of the signal-to-noise ratio in dB: what a stage may do to a module's value, and by how much more than to any
module before it."""
CEILING = 100.0
"""dB above which a fall means nothing: float32 rounds."""
MARGIN = 10.0
"""dB by which a stage's error may lie below the one that is there already, before a fall means nothing."""
SCHEMA = 1

Runners = Mapping[str, Runner]
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One way of running the model; ``note`` says why it was not run."""

    name: str
    how: str
    note: str = ""

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "how": self.how, "note": self.note}


@dataclass
class Module:
    """One module of one entry. By stage: its difference from the checkpoint's value, and from the stage before.

    Each is the worst over all calls; a stage is missing where it was not run, or has a value of another shape.
    """

    entry: str
    path: str
    shape: tuple[int, ...]
    reference: dict[str, Difference] = field(default_factory=dict)
    previous: dict[str, Difference] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        stages = dict.fromkeys([*self.reference, *self.previous])
        return {
            "entry": self.entry,
            "path": self.path,
            "shape": list(self.shape),
            "stages": {
                name: {
                    "reference": self.reference[name].as_dict() if name in self.reference else None,
                    "previous": self.previous[name].as_dict() if name in self.previous else None,
                }
                for name in stages
            },
        }


@dataclass(frozen=True)
class Departure:
    """The first module, in the order of execution, at which a stage departs from the one before it."""

    stage: str
    entry: str
    path: str
    snr: float
    why: str

    def as_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "entry": self.entry, "path": self.path, "snr": self.snr, "why": self.why}


@dataclass(frozen=True)
class ModuleDifferences:
    """What was found: ``modules`` in the order of execution, a departure at most for each stage."""

    stages: tuple[Stage, ...]
    modules: tuple[Module, ...]
    departures: tuple[Departure, ...]
    calls: int

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA,
            "calls": self.calls,
            "stages": [stage.as_json() for stage in self.stages],
            "modules": [module.as_json() for module in self.modules],
            "departures": [departure.as_json() for departure in self.departures],
        }


def module_differences(
    checkpoint: str,
    bundle: Path,
    modules: str,
    *,
    component: str | None = None,
    bound: float = BOUND,
    drop: float = DROP,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> ModuleDifferences:
    """Compare the modules that ``modules`` names (:func:`~optpass.rewrite.probes.choice_of`).

    A stage departs where its signal-to-noise ratio against the stage before is below ``bound`` dB, or more than
    ``drop`` dB below that of every module before; the latter only if that is much beside the error that is there.

    Raises:
        UserError: as :func:`~optpass.evaluate.replay.replay`, or no module is chosen.
    """
    choice = choice_of(modules)
    made = replay(checkpoint, bundle, component, progress)
    with tempfile.TemporaryDirectory() as temporary:
        look = _Look(made, choice, modules, Path(temporary), progress)
        calls = look.walk(seed)
    found = tuple(look.modules.values())
    stages = [stage.name for stage in look.stages if not stage.note and stage.name != REFERENCE]
    departures = [departure for name in stages if (departure := _departure(name, found, bound, drop))]
    return ModuleDifferences(tuple(look.stages), found, tuple(departures), calls)


class _Look:
    """The stages over one set of probes, and what their values differ by."""

    def __init__(self, made: Replayed, choice: Choice, named: str, folder: Path, progress: Progress) -> None:
        self.made = made
        self.progress = progress
        self.looked_at, self.probes = probed(made.program, choice, named)
        self.modules: dict[tuple[str, str], Module] = {}
        self.stages: list[Stage] = []
        self.reference = self._reference(choice, named)
        self.optimised = self._stage(
            OPTIMISED, "the passes' result, by PyTorch", lambda: program_runners(self.looked_at)
        )
        others = {
            ONNX: ("ONNX Runtime without its optimisations", self._onnx),
            ENGINE: (f"target {made.target_name}, lowered with the probes", self._engine),
        }
        self.others: dict[str, Runners] = {}
        for name, (how, load) in others.items():
            place = folder / name
            place.mkdir()
            if runners := self._stage(name, how, lambda load=load, place=place: load(place)):  # type: ignore[misc]
                self.others[name] = runners

    def _stage(self, name: str, how: str, load: Callable[[], Runners]) -> Runners:
        self.progress(f"load: {name}", 0.0)
        try:
            runners, note = load(), ""
        except UserError as error:
            runners, note = {}, str(error)
        self.stages.append(Stage(name, how, note))
        self.progress(f"load: {name}", 1.0)
        return runners

    def _reference(self, choice: Choice, named: str) -> tuple[Runners, Mapping[str, Mapping[str, Probe]]]:
        how = "the checkpoint, by PyTorch in float32"
        if resized := resized_inputs(self.made.reference, self.made.program):
            self.stages.append(Stage(REFERENCE, how, resized))
            return {}, {}
        program, found = probed(widened(self.made.reference), choice, named)
        return self._stage(REFERENCE, how, lambda: program_runners(program)), found

    def _onnx(self, folder: Path) -> Runners:
        from optpass.interchange.onnx_runners import plain_onnx_runners

        return plain_onnx_runners(self.looked_at, folder)

    def _engine(self, folder: Path) -> Runners:
        target = self.made.target
        type(target).check_installed(self.made.target_name)
        if target.runs() == "elsewhere":
            raise UserError("its engines do not run on this machine")
        return lowered_runners(target, self.looked_at, folder)

    def walk(self, seed: int) -> int:
        """Call everything that is called, and compare; how many calls of the module that were."""
        program = self.made.program
        seen: list[tuple[str, Values, Values]] = []
        runners = {name: _told(name, self.optimised[name], program, seen) for name in program.entries}
        count = 0
        for name, runner in call_runners(program, runners).items():
            calls = timed_calls(program_calls(program)[name], program.ranges, seed, loop=program.loop)
            for tensors in calls:
                seen.clear()
                runner(tensors)
                references = self._reference_values(name, tensors)
                for entry, given, values in seen:
                    self._compare(entry, references, values, given)
                count += 1
                self.progress(f"call: {name}", count / len(calls))
        order = {(entry, path): None for entry, each in self.probes.items() for path in each}
        self.modules = {key: self.modules[key] for key in order if key in self.modules}
        return count

    def _reference_values(self, call: str, tensors: Values) -> dict[str, Tensor]:
        """By module path, what the checkpoint's modules return in this call."""
        runners, found = self.reference
        entry = call if call in runners else next(iter(runners), "")
        if not entry:
            return {}
        values = runners[entry](tensors)
        return {path: values[probe.port] for path, probe in found[entry].items()}

    def _compare(self, entry: str, references: Values, values: Values, given: Values) -> None:
        each: dict[str, Values] = {OPTIMISED: values}
        each |= {name: runners[entry](given) for name, runners in self.others.items()}
        for path, probe in self.probes[entry].items():
            shape = tuple(values[probe.port].shape)
            module = self.modules.setdefault((entry, path), Module(entry, path, shape))
            reference = references.get(path)
            if reference is not None and reference.shape != shape:
                reference = None
            before = reference
            for name, found in each.items():
                value = found[probe.port]
                _worsen(module.reference, name, reference, value)
                _worsen(module.previous, name, before, value)
                before = value


def _worsen(kept: dict[str, Difference], name: str, before: Tensor | None, value: Tensor) -> None:
    if before is not None:
        kept[name] = kept.get(name, EQUAL).worst(tensor_difference(before, value))


def _told(name: str, runner: Runner, program: Program, seen: list[tuple[str, Values, Values]]) -> Runner:
    """``runner`` of a probed entry as one of the entry itself; what it was given and gave is added to ``seen``."""
    outputs = program.entries[name].signature.outputs

    def run(tensors: Values) -> dict[str, Tensor]:
        given = dict(tensors)
        values = runner(given)
        seen.append((name, given, values))
        return {output: values[output] for output in outputs}

    return run


def _departure(stage: str, modules: Sequence[Module], bound: float, drop: float) -> Departure | None:
    lowest: float | None = None
    for module, snr in _ratios(stage, modules):
        why = ""
        if math.isnan(snr) or snr < bound:
            why = f"below {bound:g} dB"
        elif lowest is not None and min(lowest, CEILING) - snr > drop and snr < _drowned(module, stage):
            why = f"{min(lowest, CEILING) - snr:.0f} dB below every module before it"
        if why:
            return Departure(stage, module.entry, module.path, snr, why)
        lowest = snr if lowest is None else min(lowest, snr)
    return None


def _drowned(module: Module, stage: str) -> float:
    """The ratio from which on what ``stage`` does is small beside what the stage before it has of error."""
    found = list(module.reference)
    before = found[: found.index(stage)] if stage in found else []
    return module.reference[before[-1]].snr + MARGIN if before else math.inf


def _ratios(stage: str, modules: Sequence[Module]) -> Iterator[tuple[Module, float]]:
    return ((module, module.previous[stage].snr) for module in modules if stage in module.previous)
