"""The manager holds passes to what they declare, tells callbacks the truth, and leaves its input alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.errors import ContractError, DialectError, MissingValuesError, OptpassError, UserError
from optpass.evaluate.difference import program_difference
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.ir.weights import Absent, Scale, WeightStore
from optpass.pipeline.contract import approximate, exact
from optpass.pipeline.manager import Event, run_passes
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.verification import Verification

aten = torch.ops.aten


class DoubleTwice(Pass):
    """x → x·2·0.5: the same function in two more nodes."""

    contract = exact(1e-6)
    factor: float = 0.5

    def run(self, program: Program, context: Context) -> Program:
        graph = program.entries["full"]
        node = graph.calls[0]
        with graph.before(graph.calls[1]):
            doubled = graph.call(aten.mul.Tensor, node, 2.0, like=node)
            back = graph.call(aten.mul.Tensor, doubled, self.factor, like=node)
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not doubled)
        context.rewrote(node)
        return program


class ScaleWeights(Pass):
    """W → 1.5·W, which it wrongly calls exact."""

    contract = exact(1e-5)

    def run(self, program: Program, context: Context) -> Program:
        name = program.entries["full"].weight_names[0]
        context.rewrote(name)
        return program.with_weights({name: Scale(program.weights[name], 1.5)})


class Idle(Pass):
    """Changes nothing and says where it looked."""

    contract = exact()

    def run(self, program: Program, context: Context) -> Program:
        context.decline(program.entries["full"].calls[0], "nothing to do here")
        return program


class Chooses(Idle):
    """Measures something, and chooses its width by that."""

    width: int = 0

    def run(self, program: Program, context: Context) -> Program:
        if not self.width:
            context.settle(width=3)
        context.facts["curve"] = [0.5, 0.25]
        return program


class Boaster(Idle):
    """Reports a site and changes nothing."""

    def run(self, program: Program, context: Context) -> Program:
        context.rewrote("0")
        return program


class Sneak(ScaleWeights):
    """Changes a weight and reports no site."""

    contract = approximate()

    def run(self, program: Program, context: Context) -> Program:
        return super().run(program, Context())


class Vandal(Idle):
    """Leaves an in-place operator behind."""

    def run(self, program: Program, context: Context) -> Program:
        graph = program.entries["full"]
        node = graph.calls[-1]
        with graph.before(graph.output_node):
            graph.output_node.args = ((graph.call(aten.relu_.default, node, like=node),),)
        context.rewrote(node)
        return program


class Crash(Idle):
    """Raises something that is no OptpassError."""

    def run(self, program: Program, context: Context) -> Program:
        raise ZeroDivisionError("by design")


class Ensuring(DoubleTwice):
    """Promises that no multiplication is left."""

    def ensures(self, program: Program) -> list[str]:
        left = [n.name for n in program.entries["full"].calls if n.target is aten.mul.Tensor]
        return [f"{name} is left" for name in left]


class Reader(Idle):
    """Needs values."""

    executes = True


class Demanding(Idle):
    """Requires a convolution."""

    def requires(self, program: Program) -> list[str]:
        return ["there is no convolution"]


@pytest.fixture
def program(capture_module, tiny_classifier):
    return capture_module(tiny_classifier, input=torch.empty(2, 6))[0]


def test_exact_pass_holds_and_its_input_is_untouched(program):
    before = program_text(program)
    after, [record] = run_passes(program, [Step("double", DoubleTwice())], [Verification()])
    assert program_text(program) == before
    assert len(after.entries["full"].calls) == len(program.entries["full"].calls) + 2
    assert record.modified
    assert record.as_json()["sites"] == 1
    assert record.facts["verified"].startswith("held")
    assert record.facts["difference"]["relative_error"] == 0.0


def test_exact_pass_that_is_not_is_refused_with_the_error_measured(program):
    with pytest.raises(ContractError, match=r"'scale'.*exact to 1e-05.*difference"):
        run_passes(program, [Step("scale", ScaleWeights())], [Verification()])


def test_a_wrong_option_breaks_the_contract_too(program):
    with pytest.raises(ContractError):
        run_passes(program, [Step("double", DoubleTwice(factor=0.6))], [Verification()])


def test_an_unmodified_program_says_so_with_the_reason(program):
    after, [record] = run_passes(program, [Step("idle", Idle())])
    assert not record.modified
    assert record.after is record.before
    assert record.as_json()["declined"] == [
        {"entry": "full", "path": "0", "node": "linear", "reason": "nothing to do here"}
    ]
    assert program_text(after) == program_text(program)


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (Boaster(), ContractError, "changed nothing"),
        (Sneak(), ContractError, "reported no site"),
        (Vandal(), DialectError, "'it'.*relu_.*works in place"),
        (Crash(), OptpassError, "'it' failed: ZeroDivisionError: by design"),
        (Ensuring(), ContractError, "mul.* is left"),
        (Demanding(), UserError, "there is no convolution"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_refusals(program, record, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        run_passes(program, [Step("it", record)])


def test_a_pass_that_needs_values_is_refused_without_them(program):
    absent = {n: Absent(n, e.shape, e.dtype) for n, e in program.weights.items()}
    bare = Program(program.entries, WeightStore(absent), program.origin)
    with pytest.raises(MissingValuesError, match="structure-only"):
        run_passes(bare, [Step("reader", Reader())])
    _, [record] = run_passes(bare, [Step("double", DoubleTwice())], [Verification()])
    assert record.facts["verified"] == "not verified: captured structure-only"


def test_events_come_in_order_and_failure_carries_the_program_before(program):
    events: list[Event] = []
    steps = [Step("double", DoubleTwice()), Step("crash", Crash())]
    with pytest.raises(OptpassError):
        run_passes(program, steps, [events.append])
    assert [(e.kind, e.step.name) for e in events] == [
        ("started", "double"), ("finished", "double"), ("started", "crash"), ("failed", "crash"),
    ]  # fmt: skip
    assert program_text(events[-1].before) == program_text(events[1].after)
    assert isinstance(events[-1].error, ZeroDivisionError)


def test_a_callback_that_raises_stops_the_run(program):
    def gate(event: Event) -> None:
        if event.kind == "finished":
            raise UserError("no further")

    with pytest.raises(UserError, match="no further"):
        run_passes(program, [Step("idle", Idle()), Step("crash", Crash())], [gate])


def test_weights_that_nothing_reads_are_dropped(capture_module):
    class Cut(Idle):
        def run(self, program: Program, context: Context) -> Program:
            graph = program.entries["full"]
            linear = graph.calls[-1]
            linear.replace_all_uses_with(linear.args[0])
            graph.remove_dead_code()
            context.rewrote(linear)
            return program

    def built() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    program, _ = capture_module(built, input=torch.empty(2, 4))
    after, [record] = run_passes(program, [Step("cut", Cut())])
    assert list(after.weights) == ["0.weight", "0.bias"]
    assert record.before.totals.parameters == 40
    assert record.after.totals.parameters == 20


def test_what_a_pass_settles_and_tells_is_in_the_record(capture_module, tiny_classifier):
    program, _ = capture_module(tiny_classifier, input=torch.randn(2, 6))
    _, [record] = run_passes(program, [Step("chooses", Chooses())])
    told = record.as_json()
    assert told["options"] == {"width": 3}
    assert told["curve"] == [0.5, 0.25]
    # Replayed with what it settled, it settles nothing.
    _, [again] = run_passes(program, [Step("chooses", record.record)])
    assert again.record is record.record


class Shifts(Pass):
    """A pass that changes the function on purpose, and says what it is to be."""

    contract = exact(1e-6)

    def run(self, program, context):
        context.rewrote("last")
        return program.with_weights({"2.bias": Scale(program.weights["2.bias"], 3.0)})

    def reference(self, program):
        return program.with_weights({"2.bias": Scale(program.weights["2.bias"], 3.0)})


def test_what_results_are_compared_with_keeps_no_error_of_earlier_passes(program):
    events = []
    run_passes(program, [Step("scale", ScaleWeights()), Step("shift", Shifts())], [events.append])
    last = events[-1]
    assert program_difference(last.reference, last.after).relative_error == 0
    assert program_difference(last.original, last.after).relative_error > 0
    assert program_difference(last.original, Shifts().reference(program)).relative_error == 0
