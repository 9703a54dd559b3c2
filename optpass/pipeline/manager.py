"""Runs a list of passes over a Program: check, run, verify, record; then tell whoever listens.

The loop is short on purpose. Timing, dumps, progress, contract verification and gates are all
callbacks on the same events, so a new concern is a new callback and not a new branch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from optpass.analysis.cost import Cost, measure
from optpass.analysis.generation import SampleCost, sample_cost
from optpass.errors import ContractError, DialectError, MissingValuesError, OptpassError, UserError
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.hashing import file_digest, text_digest
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.pipeline.passes import Context, Declined, Pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.target import Target


@dataclass
class PassRecord:
    """What one pass did, as it stands in the report.

    ``record`` has the options that the pass settled, ``sample`` what a sample takes after it. ``files`` are hashes of
    what it read; ``facts`` are its own, and those of callbacks. ``withdrawn`` says why its result was dropped; it has
    then modified nothing, and ``sites`` are those that it would have.
    """

    name: str
    record: Pass
    modified: bool
    sites: tuple[str, ...]
    declined: tuple[Declined, ...]
    seconds: float
    before: Cost
    after: Cost
    sample: SampleCost | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    withdrawn: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.record.summary(),
            "options": self.record.as_options(),
            "contract": str(self.record.promise),
            "modified": self.modified,
            "sites": len(self.sites),
            "site_paths": list(self.sites),
            "declined": [declined.as_json() for declined in self.declined],
            "seconds": self.seconds,
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            **({"sample": self.sample.as_json()} if self.sample else {}),
            **({"files": dict(self.files)} if self.files else {}),
            **self.facts,
            **({"withdrawn": self.withdrawn, "verified": f"rolled back: {self.withdrawn}"} if self.withdrawn else {}),
        }


@dataclass(frozen=True)
class Withdrawal:
    """What a callback answers to ``finished`` to have the pass's result dropped, and why."""

    reason: str


@dataclass(frozen=True)
class Event:
    """A moment of the run. ``after`` and ``record`` are set once the pass has finished.

    A pass that has ``finished`` is ``withdrawn`` where a callback asks for that: the run goes on with ``before``.
    ``original`` is what results are compared with: the Program that was captured, or with what a pass put
    in since then (:meth:`Pass.reference`); ``reference`` is that of ``before``.
    """

    kind: Literal["started", "finished", "withdrawn", "failed"]
    index: int
    step: Step
    before: Program
    original: Program
    after: Program | None = None
    record: PassRecord | None = None
    error: BaseException | None = None
    reference: Program | None = None


Callback = Callable[[Event], Withdrawal | None]


def run_passes(
    program: Program,
    steps: Sequence[Step],
    callbacks: Sequence[Callback] = (),
    target: Target | None = None,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> tuple[Program, list[PassRecord]]:
    """Run ``steps`` in order over ``program``, which stays as it is; the result and a record per pass.

    ``target`` is what the result will be lowered to; ``progress`` is told by passes that take their time.

    Callbacks are called in order on every event. One that raises on ``finished`` stops the run, as a
    failing pass does; both are told as a ``failed`` event, whose ``before`` is the Program to reproduce from.
    One that answers ``finished`` with a :class:`Withdrawal` has the pass's result dropped, and the callbacks after it
    are told of that alone.

    Raises:
        OptpassError: whatever a pass or a callback raised; anything that is not one is wrapped in one.
    """
    original, cost, records = program, measure(program), []
    earlier: dict[str, Program] = {}
    for index, step in enumerate(steps):
        _tell(callbacks, Event("started", index, step, program, original))
        try:
            context = Context(target, original, dict(earlier), progress)
            after, record = run_pass(program, step, cost, context=context)
            reference, compared = step.record.reference(program), original
            if reference is not program:
                # Not the reference itself: what passes before this one changed is to be seen in the end.
                compared = reference if original is program else step.record.reference(original)
            event = Event("finished", index, step, program, compared, after, record, reference=reference)
            if withdrawal := _tell(callbacks, event):
                after, compared, record = program, original, _withdrawn(record, program, withdrawal)
                _tell(callbacks, Event("withdrawn", index, step, program, original, record=record))
        except (Exception, KeyboardInterrupt) as error:
            _tell(callbacks, Event("failed", index, step, program, original, error=error))
            if isinstance(error, (OptpassError, KeyboardInterrupt)):
                raise
            message = f"pass {step.name!r} failed: {type(error).__name__}: {error}"
            raise OptpassError(message) from error
        if not record.withdrawn:
            earlier[step.name] = program
        program, original, cost = after, compared, record.after
        records.append(record)
    return program, records


def run_pass(
    program: Program,
    step: Step,
    cost: Cost | None = None,
    target: Target | None = None,
    *,
    context: Context | None = None,
) -> tuple[Program, PassRecord]:
    """One pass with everything that always holds around it: requires, dialect, honesty, ensures.

    ``context`` is a new one, in which nothing is written yet; without it the pass knows the ``target`` at most.

    Raises:
        UserError: the pass's ``requires`` refuses the Program.
        DialectError: the result is not in the canonical dialect.
        ContractError: ``ensures`` does not hold, or the pass said something untrue about itself.
    """
    name, record = step.name, step.record
    if record.executing and not program.has_values:
        raise MissingValuesError(f"pass {name!r} needs weight values; the checkpoint was captured structure-only")
    if refusals := record.requires(program):
        raise UserError(f"pass {name!r} cannot run: {'; '.join(refusals)}")
    cost = cost or measure(program)
    context = context or Context(target)
    start = time.perf_counter()
    after = record.run(program.copy(), context).pruned()
    seconds = time.perf_counter() - start
    _verify_dialect(after, name)
    modified = _fingerprint(after) != _fingerprint(program)
    _verify_honesty(name, modified, context)
    if broken := record.ensures(after):
        raise ContractError(f"pass {name!r} broke what it ensures: {'; '.join(broken)}")
    if context.settled:
        record = type(record).from_options({**record.as_options(), **context.settled}, owner=f"pass {name!r}")
    cost_after = measure(after) if modified else cost
    return after, PassRecord(
        name,
        record,
        modified,
        tuple(context.sites),
        tuple(context.declined),
        seconds,
        cost,
        cost_after,
        sample_cost(after, cost_after),
        {path.as_posix(): file_digest(path) for path in record.files()},
        dict(context.facts),
    )


def _tell(callbacks: Sequence[Callback], event: Event) -> Withdrawal | None:
    """What the first callback answered that answered anything; those after it were not told."""
    return next((answer for callback in callbacks if (answer := callback(event))), None)


def _withdrawn(record: PassRecord, program: Program, withdrawal: Withdrawal) -> PassRecord:
    """The record of a pass of which nothing is left: ``program`` is what stood before it."""
    sample = sample_cost(program, record.before)
    return replace(record, modified=False, after=record.before, sample=sample, withdrawn=withdrawal.reason)


def _verify_dialect(program: Program, name: str) -> None:
    try:
        verify(program)
        verify_shapes(program)
    except DialectError as error:
        raise DialectError(f"pass {name!r}: {error}") from error


def _verify_honesty(name: str, modified: bool, context: Context) -> None:
    if context.sites and not modified:
        raise ContractError(f"pass {name!r} reported {len(context.sites)} changed sites and changed nothing")
    if modified and not context.sites:
        raise ContractError(f"pass {name!r} changed the program and reported no site; call context.rewrote")


def _fingerprint(program: Program) -> str:
    return text_digest(program_text(program))
