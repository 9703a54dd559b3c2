"""How a sampled model is driven: which entries make a step, what they hand to each other, and when which runs.

Entries are joined by the names of their ports alone. An entry's inputs are the module's own, or
``past.S``, which reads the state S, or ``clock.K``, which the runtime fills in. Its outputs are the module's own, or
``present.S``, which writes S, or ``metric.M``, a scalar that a policy decides by. (``past`` and ``present`` are what
exporters of language models call the two ends of a key-value cache.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from optpass.errors import UserError
from optpass.ir.dimensions import Size
from optpass.ir.graph import TensorSpec
from optpass.ir.signature import Signature
from optpass.ir.weights import dtype_from_name, dtype_name

PAST, PRESENT, METRIC, CLOCK = "past.", "present.", "metric.", "clock."
PORTS = (PAST, PRESENT, METRIC, CLOCK)
LONGEST = 2048
"""Steps that a period may have."""
LOOP = "loop"
"""What the call of a whole loop is called, where calls of entries go by their names."""
CHANGE, MOTION = "change", "motion"
"""Metrics: how much something has changed since the last computed step, and how much differs from frame to frame."""
ELAPSED, INTERVALS = "elapsed", "intervals"
"""Clocks: steps since the last computed one, f32 []; and the distance of the last two computed ones, f32 [m].

Element i of the intervals is infinite while fewer than i + 2 steps were computed in this generation, the present one
included: a finite difference divided by it is zero.
"""
SAMPLES, TIMESTEPS = ("sample", "hidden_states"), ("timestep", "timestep_ratio")
"""What diffusers' denoisers call the noisy sample and the time of a step."""


def past(state: str) -> str:
    """The input that reads ``state``."""
    return PAST + state


def present(state: str) -> str:
    """The output that writes ``state``."""
    return PRESENT + state


def metric(name: str) -> str:
    """The output that tells a policy the scalar ``name``."""
    return METRIC + name


def clock(name: str) -> str:
    """The input that the runtime fills with the clock ``name``."""
    return CLOCK + name


@dataclass(frozen=True)
class State:
    """A tensor that lives between calls of entries, within a generation.

    ``initial`` is ``written`` where an entry has to write it before one reads it, ``zeros`` where it may be read
    in the first step.
    """

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    initial: Literal["written", "zeros"] = "written"

    @staticmethod
    def of(name: str, spec: TensorSpec, initial: Literal["written", "zeros"] = "written") -> State:
        """The state that holds tensors of ``spec``."""
        return State(name, spec.shape, spec.dtype, initial)

    def as_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": dtype_name(self.dtype), "initial": self.initial}


@dataclass(frozen=True)
class Cycle:
    """A fixed period: step i runs ``variants[i % len(variants)]``.

    With ``within``, that holds where low ≤ timestep ≤ high, and every other step is computed.
    """

    variants: tuple[str, ...]
    within: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        first, *others = self.variants
        regular = len(set(others)) <= 1 and first not in others
        form: dict[str, Any] = {"every": len(self.variants)} if regular else {"cycle": list(self.variants)}
        return form if self.within is None else {**form, "within": list(self.within)}


@dataclass(frozen=True)
class Listed:
    """The steps of ``of`` that are computed, counted from 0; the others reuse."""

    computed: tuple[int, ...]
    of: int

    @property
    def in_order(self) -> bool:
        """Whether 0 and later steps are listed, each once and in order."""
        steps = list(self.computed)
        return bool(steps) and steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] < self.of

    def as_json(self) -> dict[str, Any]:
        return {"steps": list(self.computed), "of": self.of}


@dataclass(frozen=True)
class Adaptive:
    """A policy that the runtime asks at every step; ``of`` is the number of steps, for policies that need it."""

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    of: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {"policy": {self.policy: dict(self.options)}, **({"of": self.of} if self.of is not None else {})}


Schedule = Cycle | Listed | Adaptive


@dataclass(frozen=True)
class Sampling:
    """How a sample is made: in ``steps`` of the sampler, and each of the model's answers to ``guidance`` questions.

    1 is a model without guidance, 2 classifier-free guidance, 3 guidance by an image and a text. Whether a pipeline
    asks in calls of their own or in rows of one call's batch is its own affair: an evaluation is one row.
    """

    steps: int
    guidance: int = 1

    @property
    def evaluations(self) -> int:
        """Of the model for one sample: what papers call NFE."""
        return self.steps * self.guidance

    def as_json(self) -> dict[str, int]:
        return {"steps": self.steps, "guidance": self.guidance}


@dataclass(frozen=True)
class Loop:
    """The loop around a module that is called once per step (or twice, with guidance in two calls).

    ``variants`` are the ways to make a step, each a chain of entries. The first computes everything and writes
    every state, the second is that of steps that reuse, where the schedule knows only the two. ``once`` are
    entries that run when a generation starts, ``tables`` those that run once for each timestep that ever comes.
    ``signature`` is the module's call, ``sample`` and ``timestep`` are two of its inputs; every other one is
    conditioning, which stays as it is during a generation. ``sampling`` is how many steps the model is made for, where
    that is known.
    """

    signature: Signature
    sample: str
    timestep: str
    variants: Mapping[str, tuple[str, ...]]
    schedule: Schedule
    states: Mapping[str, State] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    sampling: Sampling | None = None

    @property
    def computed(self) -> str:
        """The variant that computes everything."""
        return next(iter(self.variants))

    @property
    def reused(self) -> str:
        """The variant of steps that reuse; the computed one while there is no other."""
        return list(self.variants)[min(1, len(self.variants) - 1)]

    @property
    def conditioning(self) -> tuple[str, ...]:
        """The inputs that stay as they are during a generation."""
        return tuple(name for name in self.signature.inputs if name not in (self.sample, self.timestep))

    @property
    def entries(self) -> tuple[str, ...]:
        """Every entry that the loop runs, each once."""
        chains = (entry for chain in self.variants.values() for entry in chain)
        return tuple(dict.fromkeys((*self.once, *self.tables, *chains)))

    @property
    def stateless(self) -> bool:
        """Whether every step is one call of one entry, whatever came before."""
        return not self.states and len(self.variants) == 1 and len(self.variants[self.computed]) == 1

    @property
    def prefix(self) -> tuple[str, ...]:
        """The entries with which every variant begins: what runs before a policy decides."""
        chains = list(self.variants.values())
        shared = []
        for heads in zip(*chains, strict=False):
            if len(set(heads)) > 1 or len(chains) == 1:
                break
            shared.append(heads[0])
        return tuple(shared)

    def as_json(self) -> dict[str, Any]:
        return {
            "signature": self.signature.as_json(),
            "sample": self.sample,
            "timestep": self.timestep,
            "variants": {name: list(chain) for name, chain in self.variants.items()},
            "schedule": self.schedule.as_json(),
            "states": {name: state.as_json() for name, state in self.states.items()},
            "once": list(self.once),
            "tables": list(self.tables),
            **({"sampling": self.sampling.as_json()} if self.sampling else {}),
        }

    @staticmethod
    def from_json(json: Mapping[str, Any]) -> Loop:
        """
        Raises:
            KeyError, TypeError, ValueError, UserError: the record is damaged.
        """
        variants = {str(name): tuple(map(str, chain)) for name, chain in json["variants"].items()}
        if not variants or not all(variants.values()):
            raise ValueError("a loop has a variant, and a variant an entry")
        states = {
            str(name): State(
                str(name), tuple(record["shape"]), dtype_from_name(str(record["dtype"])), record["initial"]
            )
            for name, record in json["states"].items()
        }
        sampling = json.get("sampling")
        return Loop(
            Signature.from_json(json["signature"]),
            str(json["sample"]),
            str(json["timestep"]),
            variants,
            schedule_from_json(json["schedule"], tuple(variants)),
            states,
            tuple(map(str, json["once"])),
            tuple(map(str, json["tables"])),
            Sampling(int(sampling["steps"]), int(sampling["guidance"])) if sampling else None,
        )


def single_step(entry: str, signature: Signature) -> Loop | None:
    """Every step a call of ``entry``, as captured; ``None`` where the call has no sample or no timestep."""
    sample = next((name for name in SAMPLES if name in signature.inputs), None)
    timestep = next((name for name in TIMESTEPS if name in signature.inputs), None)
    if sample is None or timestep is None:
        return None
    return Loop(signature, sample, timestep, {entry: (entry,)}, Cycle((entry,)))


def usual_steps(loop: Loop | None, otherwise: int) -> int:
    """Sampling steps where nobody says how many: those that the schedule, or else the model, was made for."""
    if loop and isinstance(loop.schedule, Listed):
        return loop.schedule.of
    return loop.sampling.steps if loop and loop.sampling else otherwise


def every(period: int, variants: Sequence[str], within: tuple[float, float] | None = None) -> Cycle:
    """One computed step, then ``period − 1`` that reuse; ``variants`` are the computed and the reusing one.

    Raises:
        UserError: the period is none, or longer than :data:`LONGEST`.
    """
    if not 1 <= period <= LONGEST:
        raise UserError(f"every: {period} is no number of steps from 1 to {LONGEST}")
    return Cycle((variants[0], *[variants[-1]] * (period - 1)), within)


def schedule_from_json(json: Mapping[str, Any], variants: Sequence[str]) -> Schedule:
    """A schedule as manifests have it, over ``variants``.

    Raises:
        KeyError, TypeError, ValueError, UserError: the record is damaged.
    """
    if "policy" in json:
        ((name, options),) = json["policy"].items()
        return Adaptive(str(name), dict(options), None if json.get("of") is None else int(json["of"]))
    if "steps" in json:
        return Listed(tuple(map(int, json["steps"])), int(json["of"]))
    span = None
    if json.get("within") is not None:
        low, high = json["within"]
        span = float(low), float(high)
    if "every" in json:
        return every(int(json["every"]), variants[:2], span)
    return Cycle(tuple(map(str, json["cycle"])), span)
