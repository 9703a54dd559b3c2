"""Graphs that return what their modules return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.errors import UserError
from optpass.evaluate.difference import program_runners
from optpass.ir.dialect import verify
from optpass.rewrite.probes import choice_of, probed, probes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def captured(capture_module):
    return capture_module(Net, x=torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("choice", "paths"),
    [
        ("1", ["blocks", "head"]),
        ("2", ["blocks.0", "blocks.1", "head"]),
        ("9", ["blocks.0.up", "blocks.0", "blocks.1.up", "blocks.1", "head"]),
        ("*.down", ["blocks.0.down", "blocks.1.down"]),
        ("blocks.?", ["blocks.0", "blocks.1"]),
    ],
)
def test_modules_are_chosen_by_depth_or_by_pattern(captured, choice, paths):
    found = list(probes(captured[0].entries["full"], choice_of(choice)))
    if choice == "9":
        # As deep as they go: what a block does itself is the block's.
        paths = ["blocks.0.up", "blocks.0.down", "blocks.0", "blocks.1.up", "blocks.1.down", "blocks.1", "head"]
    assert found == paths


def test_probes_are_what_the_modules_return(captured):
    """Hooks on the eager module are the oracle."""
    program, module = captured
    copy, found = probed(program, choice_of("2"), "2")
    verify(copy)
    assert list(copy.entries["full"].signature.outputs) == ["output", "probe.0", "probe.1", "probe.2"]
    kept: dict[str, torch.Tensor] = {}
    for name in found["full"]:
        module.get_submodule(name).register_forward_hook(lambda _, __, value, name=name: kept.update({name: value}))
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = module(x)
    values = program_runners(copy)["full"]({"x": x})
    torch.testing.assert_close(values["output"], expected)
    for name, probe in found["full"].items():
        torch.testing.assert_close(values[probe.port], kept[name])
    assert list(program.entries["full"].signature.outputs) == ["output"]


@pytest.mark.parametrize(
    ("choice", "message"), [("0", "1 or more"), ("*.dwon", r"no module matches '\*\.dwon'; the nearest are .*down")]
)
def test_a_choice_of_nothing_is_refused(captured, choice, message):
    with pytest.raises(UserError, match=message):
        probed(captured[0], choice_of(choice), choice)
