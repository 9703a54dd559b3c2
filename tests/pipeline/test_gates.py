"""Gates on latency: what is measured, what noise makes of it, and what becomes of a pass that is too slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loops import cached, denoiser
from torch import nn

from optpass.errors import GateError, UserError
from optpass.evaluate import engine_latency
from optpass.evaluate.latency import Comparison, Latency, Ratio
from optpass.evaluate.scope import Scope
from optpass.interchange.storage import save_program
from optpass.ir.loop import Listed
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.ir.weights import Constant
from optpass.pipeline.apply import apply
from optpass.pipeline.contract import approximate
from optpass.pipeline.gatekeeper import GateKeeper
from optpass.pipeline.gates import Gate, LatencyGate, MetricGate, gate_of
from optpass.pipeline.manager import Event, Withdrawal, run_passes
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.plan import plan
from optpass.pipeline.recipe import Step, check_legality, load_recipe, make_recipe
from optpass.pipeline.registry import target_class
from optpass.pipeline.request import Request
from optpass.pipeline.target import Execution

OnnxRuntime = target_class("onnxruntime")
TARGET = OnnxRuntime.of("onnxruntime", {"threads": 1})
NEVER, ALWAYS = 0.01, 100.0
"""Ratios that no cast keeps to, and that every one keeps to, whatever the machine does meanwhile."""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Squares(Pass):
    """y → y·I·I·…: the same numbers after twenty more products."""

    contract = approximate()

    def run(self, program: Program, context: Context) -> Program:
        graph, eye = program.entries["full"], Constant(torch.eye(256))
        last = graph.calls[-1]
        with graph.before(graph.output_node):
            node = last
            for _ in range(20):
                node = graph.call(torch.ops.aten.mm.default, node, graph.weight("eye", eye, like=last), like=last)
        graph.output_node.args = ((node,),)
        context.rewrote(last)
        return program.with_weights({"eye": eye})


class Idle(Pass):
    """Changes nothing."""

    contract = approximate()

    def run(self, program: Program, context: Context) -> Program:
        return program


def gate(**options: Any) -> Gate:
    bound = {"max_ratio": options.pop("max_ratio", 1.0)}
    return gate_of({"latency": bound, **options}, lambda component: ["squares", "cast", "idle"])


def keeper(*gates: Gate) -> GateKeeper:
    return GateKeeper(gates, TARGET, lambda stage, fraction: None, allow_nonfinite=False)


@pytest.fixture
def wide(capture_module):
    return capture_module(Wide, x=torch.zeros(256, 256))[0]


def test_a_slower_pass_is_rolled_back_and_the_run_goes_on(wide):
    gates = keeper(gate(after="squares", on_failure="rollback"))
    steps = [Step("squares", Squares()), Step("idle", Idle())]
    events: list[Event] = []
    result, [slow, idle] = run_passes(wide, steps, [gates, events.append])
    assert program_text(result) == program_text(wide)
    assert [(event.kind, event.step.name) for event in events] == [
        ("started", "squares"), ("withdrawn", "squares"), ("started", "idle"), ("finished", "idle"),
    ]  # fmt: skip
    told = slow.as_json()
    assert told["withdrawn"].startswith("latency gate: the engine takes ")
    assert told["verified"].startswith("rolled back: ")
    assert not told["modified"]
    assert told["sites"] == 1
    assert told["after"] == told["before"] == idle.as_json()["before"]
    [record] = gates.records
    assert not record["held"]
    assert record["value"] > 1.5
    assert record["times"]["ratio"]["low"] > 1


def test_a_slower_pass_stops_the_run(wide):
    gates = keeper(gate(after="squares"))
    with pytest.raises(GateError, match=r"gate after 'squares': the engine takes .* of its time before, .* at most 1"):
        run_passes(wide, [Step("squares", Squares())], [gates])


def test_a_gate_that_names_no_pass_is_checked_after_every_one(wide, monkeypatch):
    """One that changed nothing is not measured."""
    monkeypatch.setattr(engine_latency, "engine_latency", lambda scope, **options: comparison(1.0, 0.9, 1.1))
    gates = keeper(gate())
    run_passes(wide, [Step("idle", Idle()), Step("squares", Squares())], [gates])
    assert [(record["after"], record["held"]) for record in gates.records] == [("idle", True), ("squares", True)]
    assert gates.records[0]["note"] == "the pass changed nothing"
    assert "times" not in gates.records[0]
    assert "noise does not tell the ratio (0.900 … 1.100) from 1" in gates.records[1]["note"]


def comparison(median: float, low: float, high: float) -> Comparison:
    time = Latency("", 1.0, 1.0, 1.0, 20)
    return Comparison(time, time, Ratio(median, low, high, low, high))


@pytest.mark.parametrize(
    ("ratio", "bound", "held", "noted"),
    [
        ((1.05, 0.98, 1.12), 1.0, True, True),
        ((1.05, 1.02, 1.08), 1.0, False, False),
        ((1.005, 1.004, 1.006), 1.0, True, True),
        ((0.8, 0.78, 0.82), 1.0, True, False),
        ((0.8, 0.78, 0.82), 0.7, False, False),
        ((0.8, 0.65, 0.9), 0.7, True, True),
    ],
)
def test_what_noise_covers_counts_as_kept(wide, monkeypatch, ratio, bound, held, noted):
    monkeypatch.setattr(engine_latency, "engine_latency", lambda scope, **options: comparison(*ratio))
    checked = gate(max_ratio=bound).check("squares", Scope(wide, wide, before=wide, target=TARGET))
    assert checked.record["held"] is held
    assert bool(checked.complaint) is not held
    assert bool(checked.record["note"]) is noted


def test_metric_gates_roll_back_too(wide):
    metric = gate_of(
        {"after": "squares", "metric": "snr", "min": 1e6, "on_failure": "rollback"}, lambda component: ["squares"]
    )
    assert isinstance(metric, MetricGate)
    result, [record] = run_passes(wide, [Step("squares", Squares())], [keeper(metric)])
    assert record.withdrawn.startswith("snr gate: snr is ")
    assert program_text(result) == program_text(wide)


def test_callbacks_after_the_one_that_withdraws_see_no_result(wide):
    kinds: list[str] = []

    def withdraw(event: Event) -> Withdrawal | None:
        return Withdrawal("by design") if event.kind == "finished" else None

    run_passes(wide, [Step("squares", Squares())], [withdraw, lambda event: kinds.append(event.kind)])
    assert kinds == ["started", "withdrawn"]


@pytest.mark.parametrize("schedule", [None, Listed((0, 2), of=4)])
def test_a_pass_that_splits_the_step_is_timed_over_its_schedule(schedule):
    """Both engines walk as far as the shorter schedule goes, state and all."""
    target = target_class("program").of("program", {})
    scope = Scope(denoiser()[0], cached(schedule)[0], before=denoiser()[0], target=target)
    found = engine_latency.engine_latency(scope, runs=8, seed=0)
    assert found.before.runs == found.after.runs == 8
    assert found.after.median > 0


@pytest.mark.parametrize(("how", "message"), [("emulated", "in an emulator"), ("elsewhere", "on other hardware only")])
def test_a_target_that_has_no_times_here_is_refused_before_anything_runs(how: Execution, message, monkeypatch):
    monkeypatch.setattr(OnnxRuntime, "runs", lambda self: how)
    recipe = make_recipe({"passes": [{"cast": {"dtype": "float16"}}], "gates": [{"latency": {"max_ratio": 1.0}}]})
    with pytest.raises(UserError, match=f"target 'onnxruntime' run {message}"):
        check_legality(recipe)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"latency": {"max_ratio": 0}}, "greater than 0"),
        ({"latency": {"max_ratio": 1, "runs": 4}}, "greater than or equal to 8"),
        ({"latency": {}}, "max_ratio"),
        ({"latency": {"max_ratio": 1}, "min": 3}, "unknown key 'min'"),
        ({"latency": {"max_ratio": 1}, "on_failure": "ignore"}, "'stop' or 'rollback'"),
        ({"latency": {"max_ratio": 1}, "after": "cats"}, "did you mean 'cast'"),
    ],
)
def test_gates_that_mean_nothing_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        gate_of(data, lambda component: ["cast"])


def test_it_stands_in_the_recipe_as_it_was_written():
    data = {"latency": {"max_ratio": 0.9, "runs": 10, "seed": 0}, "on_failure": "rollback"}
    found = gate_of(data, lambda component: [])
    assert isinstance(found, LatencyGate)
    assert found.as_document() == data


# ---------------------------------------------------------------------------------------------------------- the road


@pytest.fixture
def folder(tmp_path: Path, wide: Program) -> str:
    """A captured module on disk."""
    save_program(wide, tmp_path / "program")
    return str(tmp_path / "program")


def halved(**how: Any) -> dict[str, Any]:
    gates = [{"after": "cast", "latency": {"max_ratio": how.pop("max_ratio"), "runs": 8}, **how}]
    return {"passes": ["simplify", {"cast": {"dtype": "float16"}}], "gates": gates, "target": {"onnxruntime": {}}}


def test_the_report_and_the_lock_know_of_a_rollback(folder, tmp_path):
    out = tmp_path / "bundle"
    recipe = make_recipe(halved(max_ratio=NEVER, on_failure="rollback"))
    report = apply(recipe, Request(folder, out, baseline=False)).report
    simplify, cast = report["passes"]
    assert "withdrawn" not in simplify
    assert cast["withdrawn"]
    assert report["after"] == report["before"]
    assert report["engines"][0]["bytes"] > 256 * 256 * 4
    page = (out / "report.html").read_text("utf-8")
    assert "A gate did not hold, and cast was rolled back." in page
    assert "did not hold: rolled back" in page
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text("utf-8"))
    assert [list(item) for item in lock["passes"]] == [["simplify"]]
    assert lock["gates"] == []
    again = apply(load_recipe(out / "recipe.lock.yaml"), Request(folder, tmp_path / "again", baseline=False)).report
    assert again["after"] == report["after"]


@pytest.mark.slow
def test_a_gate_that_stops_leaves_a_reproducer_that_stops_too(folder, tmp_path):
    with pytest.raises(GateError) as caught:
        apply(make_recipe(halved(max_ratio=NEVER)), Request(folder, tmp_path / "bundle"))
    kept = caught.value.reproducer
    assert kept is not None
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(GateError):
        apply(load_recipe(kept / "recipe.yaml"), Request(str(kept / "program"), tmp_path / "again"))


def test_a_gate_that_holds_is_in_the_report_and_the_plan(folder, tmp_path):
    recipe = make_recipe(halved(max_ratio=ALWAYS))
    out = tmp_path / "bundle"
    foreseen = plan(recipe, Request(folder, out), assume_weights=True)
    assert "gate latency after cast" in [stage.name for stage in foreseen.components[0].stages]
    apply(recipe, Request(folder, out, baseline=False))
    [record] = json.loads((out / "report.json").read_text("utf-8"))["gates"]
    assert record["held"]
    assert record["metric"] == "latency"
    assert record["max"] == ALWAYS
