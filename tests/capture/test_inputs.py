"""Sizes that follow from others, sizes as numbers, and how both meet what the user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Example, Input, Inputs, Number, Product
from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Origin, Program
from optpass.runtime.looped import program_module
from optpass.runtime.module import EngineModule

PACKED = Inputs(
    {
        "tokens": Input(("batch", Product(("frames", "height", "width")), 3)),
        "control": Input(("batch", Product(("height",), 8), Product(("width",), divisor=2))),
        "rotary.0": Input((Product(("height",)), 4)),
        "rotary.1": Input((Product(("height",)), 4)),
    },
    {"batch": 1, "frames": 2, "height": 4, "width": 6},
    {"frames": Number("frames"), "shapes": [[(1, Number("height"), Number("width"))]], "scale": 0.5},
)
FREE = Inputs(PACKED.tensors, PACKED.sizes)


def example(inputs: Inputs, **sizes: Any) -> Example:
    return inputs.arguments(sizes, {}, torch.float32)


def shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    def shape(value: Any) -> Any:
        return tuple(value.shape) if isinstance(value, Tensor) else tuple(map(shape, value))

    return {name: shape(arguments[name]) for name in ("tokens", "control", "rotary")}


def test_sizes_follow_and_numbers_too() -> None:
    found = example(PACKED, height=[8], tokens=[2, 96, 3]).arguments
    assert shapes(found) == {"tokens": (2, 96, 3), "control": (2, 64, 3), "rotary": ((8, 4), (8, 4))}
    assert (found["frames"], found["shapes"], found["scale"]) == (2, [[(1, 8, 6)]], 0.5)


@pytest.mark.parametrize(
    ("inputs", "sizes", "message"),
    [
        (PACKED, {"tokens": [1, 47, 3]}, r"\(batch, frames·height·width, 3\), here \[1, 48, 3\]; got \[1, 47, 3\]"),
        (PACKED, {"control": [1, 8, 3]}, r"\(batch, 8·height, width/2\), here \[1, 32, 3\]"),
        (PACKED, {"heigth": [4]}, "no input 'heigth'; did you mean 'height'"),
        (PACKED, {"height": [Span(2, 8)]}, "takes height as a number, which a graph cannot keep open"),
        (FREE, {"height": [Span(2, 8)], "frames": [Span(1, 4)]}, "of frames, height, width only one can stay open"),
        (FREE, {"width": [Span(2, 8)]}, "where the others make a whole multiple"),
    ],
)
def test_sizes_that_cannot_be(inputs: Inputs, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        example(inputs, **sizes)


def test_what_follows_from_an_open_size_is_a_multiple_of_it() -> None:
    found = example(FREE, height=[Span(2, 8)])
    assert [item.name for item in found.dimensions] == ["height"]
    assert found.multiples == {
        "tokens": {1: ("height", 12)},
        "control": {1: ("height", 8)},
        "rotary.0": {0: ("height", 1)},
        "rotary.1": {0: ("height", 1)},
    }


class Controlled(nn.Module):
    """Adds to an image what a larger one says, as control networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 3)

    def forward(self, image: Tensor, control: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool1d(control, 4)
        return self.project((image + pooled).transpose(1, 2))


def controlled() -> tuple[Program, nn.Module]:
    inputs = Inputs(
        {"image": Input((2, 3, "width")), "control": Input((2, 3, Product(("width",), 4)))},
        {"width": 5},
    )
    torch.manual_seed(0)
    real = Controlled().eval()
    fake, mode = build_fake(Controlled)
    from optpass.ir.weights import Constant

    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    return export_program(fake, mode, example(inputs, width=[Span(2, 12)]), weights, Origin("test")), real


def engine(program: Program) -> EngineModule:
    return program_module(program)


def test_a_graph_keeps_what_follows_open() -> None:
    program, real = controlled()
    graph = program.entries["full"]
    assert [str(spec) for spec in graph.inputs] == ["image: f32[2, 3, width]", "control: f32[2, 3, 4*width]"]
    for width in (2, 7, 12):
        tensors = random_inputs(graph.inputs_at({"width": width}), {}, seed=width)
        assert tensors["control"].shape == (2, 3, 4 * width)
        with torch.no_grad():
            torch.testing.assert_close(engine(program)(**tensors), real(**tensors))


def test_a_call_whose_sizes_do_not_follow_is_refused() -> None:
    program, _ = controlled()
    with pytest.raises(UserError, match=r"input control\[2\] is 24, and follows .* 4\*width"):
        engine(program)(image=torch.zeros(2, 3, 7), control=torch.zeros(2, 3, 24))
    with pytest.raises(UserError, match=r"width is 13"):
        engine(program)(image=torch.zeros(2, 3, 13), control=torch.zeros(2, 3, 52))


class ViewsByTheOther(nn.Module):
    """Views one input by the batch of another, as transformers do with the embedding of a timestep."""

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        return tokens + shift.view(tokens.shape[0], -1, 4)


def test_one_dimension_of_two_inputs_is_one_size() -> None:
    inputs = Inputs({"tokens": Input(("batch", 2, 4)), "shift": Input(("batch", 8))}, {"batch": 3})
    module, mode = build_fake(ViewsByTheOther)
    program = export_program(module, mode, example(inputs, batch=[Span(2, 6)]), {}, Origin("test"))
    graph = program.entries["full"]
    assert [str(spec) for spec in graph.inputs] == ["tokens: f32[batch, 2, 4]", "shift: f32[batch, 8]"]
    for batch in (2, 5):
        tensors = random_inputs(graph.inputs_at({"batch": batch}), {}, seed=batch)
        torch.testing.assert_close(engine(program)(**tensors), ViewsByTheOther()(**tensors))
