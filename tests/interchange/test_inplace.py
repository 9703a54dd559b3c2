"""In-place operators: which become functional here, and that what they wrote is read by the right readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.errors import UserError
from optpass.interchange.inplace import make_functional
from optpass.ir.dialect import is_inplace


class Model(nn.Module):
    """Runs ``function`` on an input and a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def sum_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y += x
    return y.relu_()


def read_under_the_old_name(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.add_(1.0)
    y.mul_(w)
    return y - w


def view_written_and_read_alone(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).reshape(-1).add_(1.0)


def copied_first(x: Tensor, w: Tensor) -> Tensor:
    return x.clone().mul_(w) + x


def dropped_in_place(x: Tensor, w: Tensor) -> Tensor:
    return nn.functional.dropout(x * w, 0.5, training=False, inplace=True)


def read_before(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x * w
    before = y + 1
    return before, y.mul_(2.0)


def view_read_later(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    view = y.reshape(-1)
    y.add_(1.0)
    return view * 2


def part_written(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y[:, 1] += 1.0
    return y


def written_through_a_split(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.chunk(2, 1)[0].mul_(3.0)
    return y


PLAIN = [
    sum_in_place,
    read_under_the_old_name,
    view_written_and_read_alone,
    copied_first,
    dropped_in_place,
    read_before,
]
OTHERS = [view_read_later, part_written, written_through_a_split]


def exported(function: Callable[[Tensor, Tensor], Any]) -> Any:
    with torch.no_grad():
        return torch.export.export(Model(function).eval(), (torch.randn(3, 4),), strict=False)


@pytest.mark.parametrize("function", PLAIN)
def test_plain_operators_become_functional(function: Callable[[Tensor, Tensor], Any]) -> None:
    graph = exported(function).graph
    assert any(is_inplace(node.target) for node in graph.nodes)
    assert make_functional(graph)
    assert not any(is_inplace(node.target) for node in graph.nodes)
    graph.lint()


@pytest.mark.parametrize("function", OTHERS)
def test_what_others_look_at_is_left_as_it_is(function: Callable[[Tensor, Tensor], Any]) -> None:
    graph = exported(function).graph
    before = str(graph)
    assert not make_functional(graph)
    assert str(graph) == before


@pytest.mark.parametrize("function", [*PLAIN, *OTHERS])
def test_the_function_is_the_same(
    function: Callable[[Tensor, Tensor], Any], capture_module: Any, assert_same_function: Any
) -> None:
    program, module = capture_module(lambda: Model(function), x=torch.zeros(3, 4))
    assert_same_function(program, module)


def write_to_the_input(x: Tensor, w: Tensor) -> Tensor:
    return x.add_(w)


def test_a_model_that_writes_to_its_input_is_refused(capture_module: Any) -> None:
    with pytest.raises(UserError, match="writes to 'x' while it runs"):
        capture_module(lambda: Model(write_to_the_input), x=torch.zeros(3, 4))
