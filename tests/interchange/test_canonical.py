"""What torch.export leaves behind becomes the dialect, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.errors import UserError
from optpass.ir.graph import path_of
from optpass.ir.program import Origin
from optpass.ir.text import operator_name
from optpass.ir.weights import Constant


class WritesThroughAView(nn.Module):
    """Renaming ``relu_`` to ``relu`` would leave ``y`` with the values from before."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + 1
        y = x.view(-1)
        x.relu_()
        return y * 2, x


class WritesIntoASlice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x[:, 0] = 5.0
        x[0].add_(1)
        return x.transpose(0, 1).contiguous().view(-1)


class Residual(nn.Module):
    """An in-place ReLU after a BatchNorm, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.relu(out)


class Blocks(nn.Module):
    """no_grad and autocast blocks, a literal, an unused None argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            scaled = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
        with torch.autocast("cpu", enabled=False):
            out = self.linear(scaled)
        return torch.flatten(out.expand_as(x).clone().detach(), 0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (WritesThroughAView, {"x": torch.zeros(2, 3)}),
        (WritesIntoASlice, {"x": torch.zeros(2, 3)}),
        (Residual, {"x": torch.zeros(2, 3, 4, 4)}),
        (Blocks, {"x": torch.zeros(2, 4)}),
        (Tied, {"tokens": torch.zeros(2, 3, dtype=torch.int64)}),
    ],
)
def test_the_graph_computes_what_the_module_computes(
    build: Any, example: dict[str, Tensor], capture_module: Any, assert_same_function: Any
) -> None:
    program, module = capture_module(build, **example)
    assert_same_function(program, module, atol=1e-6)


def test_provenance_survives_functionalisation(capture_module: Any) -> None:
    program, _ = capture_module(Residual, x=torch.zeros(1, 3, 4, 4))
    paths = {operator_name(node): path_of(node) for node in program.entries["full"].calls}
    assert paths == {"conv2d": "conv", "batch_norm": "norm", "add.Tensor": "(root)", "relu": "relu"}


def test_layers_keep_their_single_nodes_through_functionalisation(capture_module: Any) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), input=torch.zeros(1, 4))
    assert [operator_name(node) for node in program.entries["full"].calls] == ["linear", "relu"]


def test_tied_weights_are_one_weight(capture_module: Any) -> None:
    program, _ = capture_module(Tied, tokens=torch.zeros(1, 2, dtype=torch.int64))
    assert list(program.used_weights()) == ["embed.weight"]


def test_a_tied_weight_is_found_under_either_name() -> None:
    fake, mode = build_fake(Tied)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    checkpoint = {"head.weight": Constant(torch.ones(7, 4))}
    program = export_program(fake, mode, {"tokens": tokens}, checkpoint, Origin("test"))
    assert list(program.used_weights()) == ["head.weight"]


def test_a_module_that_writes_to_its_input_is_refused(capture_module: Any) -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.relu_()
            return x

    with pytest.raises(UserError, match="the model writes to 'x' while it runs"):
        capture_module(Overwrites, x=torch.zeros(2))


def test_a_module_that_torch_export_refuses_is_reported(capture_module: Any) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"torch\.export cannot capture Branches: at \(root\): Could not guard"):
        capture_module(Branches, x=torch.zeros(2))
