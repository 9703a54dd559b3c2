"""Every module from the checkpoint to the engine, and where a stage departs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import cached
from torch import Tensor, nn

from optpass import cli
from optpass.errors import UserError
from optpass.evaluate import module_differences as module
from optpass.evaluate.difference import Difference
from optpass.evaluate.module_differences import BOUND, DROP, ENGINE, ONNX, OPTIMISED, Module, module_differences
from optpass.interchange.storage import save_program
from optpass.ir.program import Program
from optpass.ir.weights import Scale
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.registry import target_class
from optpass.pipeline.request import Request

STAGES = [OPTIMISED, ONNX, ENGINE]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(home: Path, program: Program, passes: list[Any]) -> tuple[str, Path]:
    """A checkpoint in ``home``, and the bundle that a recipe makes of it."""
    save_program(program, home / "checkpoint")
    recipe = make_recipe({"passes": passes, "target": {"onnxruntime": {"threads": 1}}})
    apply(recipe, Request(str(home / "checkpoint"), home / "bundle", verify="never"))
    return str(home / "checkpoint"), home / "bundle"


@pytest.fixture(scope="module")
def halved(tmp_path_factory, request) -> tuple[str, Path]:
    from optpass.testing import capture_module

    program = capture_module(Net, x=torch.zeros(3, 8))[0]
    return made(tmp_path_factory.mktemp("halved"), program, ["simplify", {"cast": {"dtype": "float16"}}])


def test_stages_are_compared_with_the_checkpoint_and_with_one_another(halved):
    found = module_differences(*halved, "2")
    assert [item.path for item in found.modules] == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert [(stage.name, stage.note) for stage in found.stages[1:]] == [(name, "") for name in STAGES]
    assert found.departures == ()
    for item in found.modules:
        # Eleven bits, and roundings that add up.
        assert 50 < item.reference[OPTIMISED].snr < 90
        assert item.reference[ENGINE].snr > 50
        assert item.previous[ONNX].snr > 50


def test_the_first_module_that_departs_is_named(halved):
    [first, *_] = module_differences(*halved, "2", bound=95).departures
    assert (first.stage, first.path, first.why) == (OPTIMISED, "blocks.0", "below 95 dB")


def test_an_engine_that_goes_wrong_in_one_module_is_found_there(halved, monkeypatch):
    """The probes of the second block and of what follows it are disturbed in the engine alone."""
    lowered = module.lowered_runners

    def disturbed(target, program, folder):
        runners = lowered(target, program, folder)

        def run(tensors):
            values = runners["full"](tensors)
            return {name: value * 1.1 if name in ("probe.1", "probe.2") else value for name, value in values.items()}

        return {"full": run}

    monkeypatch.setattr(module, "lowered_runners", disturbed)
    [departure] = module_differences(*halved, "2").departures
    assert (departure.stage, departure.entry, departure.path) == (ENGINE, "full", "blocks.1")
    assert departure.snr == pytest.approx(20, abs=0.1)


def test_a_loop_is_walked_and_every_entry_looked_at(tmp_path):
    checkpoint, bundle = made(tmp_path, cached()[0], [])
    found = module_differences(checkpoint, bundle, "1")
    assert found.calls == 2
    entries = {entry: [item.path for item in found.modules if item.entry == entry] for entry in ("full", "reuse")}
    assert entries == {"full": ["enter", "inner", "mix", "leave"], "reuse": ["enter", "leave"]}
    assert {item["stage"] for item in found.as_json()["departures"]} == {OPTIMISED}
    [departure] = found.departures
    # The second step takes the inner layer's value from the first.
    assert (departure.entry, departure.path) == ("reuse", "leave")
    assert all(item.previous[ENGINE].snr > 100 for item in found.modules)


def test_an_engine_of_other_hardware_is_left_out_with_the_reason(halved, monkeypatch):
    monkeypatch.setattr(target_class("onnxruntime"), "runs", lambda self: "elsewhere")
    found = module_differences(*halved, "1")
    assert found.stages[-1].note == "its engines do not run on this machine"
    assert all(ENGINE not in item.previous for item in found.modules)


def test_another_checkpoint_is_refused(halved, tmp_path, capture_module):
    program = capture_module(Net, x=torch.zeros(3, 8))[0]
    other = program.with_weights({"head.bias": Scale(program.weights["head.bias"], 2.0)})
    save_program(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"other is not the checkpoint that .* was made from"):
        module_differences(str(tmp_path / "other"), halved[1], "1")


@pytest.mark.slow
def test_resized_inputs_are_compared_with_the_checkpoint_at_their_size(tmp_path, capture_module):
    program = capture_module(Net, x=torch.zeros(3, 8))[0]
    checkpoint, bundle = made(tmp_path, program, [{"resize-inputs": {"inputs": {"x": [5, 8]}}}])
    found = module_differences(checkpoint, bundle, "1")
    assert [item.shape for item in found.modules] == [(5, 8), (5, 2)]
    assert all(item.reference[ENGINE].snr > 100 for item in found.modules)


@pytest.mark.parametrize(
    ("ratios", "where", "why"),
    [
        ([120, 110, 105], None, ""),
        ([120, 75, 70], "1", "25 dB below every module before it"),
        ([120, 60, 20], "1", "40 dB below every module before it"),
        ([60, 55, 39], "2", "below 40 dB"),
        ([45, 42, 44], None, ""),
        ([300, float("nan"), 300], "1", "below 40 dB"),
    ],
)
def test_a_departure_is_a_low_ratio_or_a_fall(ratios, where, why):
    modules = [
        Module("full", str(index), (1,), previous={ENGINE: Difference(0, 0, float(snr))})
        for index, snr in enumerate(ratios)
    ]
    departure = module._departure(ENGINE, modules, BOUND, DROP)
    assert (departure.path if departure else None) == where
    if departure:
        assert departure.why == why


@pytest.mark.parametrize(("already", "departs"), [(30.0, False), (60.0, True)])
def test_a_fall_that_drowns_in_the_error_that_is_there_is_none(already, departs):
    error = Difference(0, 0, already)
    modules = [
        Module(
            "full", str(snr), (1,), {OPTIMISED: error, ENGINE: error}, {OPTIMISED: error, ENGINE: Difference(0, 0, snr)}
        )
        for snr in (110.0, 62.0)
    ]
    assert bool(module._departure(ENGINE, modules, BOUND, DROP)) is departs


def test_the_command_prints_a_table_or_json(halved, monkeypatch, capsys):
    for flag in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["optpass", "compare", *map(str, halved), "--modules", "blocks.?", *flag])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        out = capsys.readouterr().out
        if flag:
            assert [item["path"] for item in json.loads(out)["modules"]] == ["blocks.0", "blocks.1", "blocks.2"]
        else:
            assert "engine departs nowhere from the stage before" in out
            assert out.count(" dB") >= 9
