"""Captures with open sizes, held to the eager module at sizes that torch.export never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.analysis.cost import measure
from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.spans import size_from
from optpass.errors import UserError
from optpass.interchange.storage import load_program, save_program
from optpass.ir.dialect import verify_shapes
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant
from optpass.runtime.looped import program_module
from optpass.testing import randomised

Factory = type[nn.Module]


class Halving(nn.Module):
    """Halves and doubles its image, and adds what it began with: sizes must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2d(8, 3, 3, padding=1)
        self.tokens = nn.Linear(8, 8)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.down(image)
        batch, channels, height, width = hidden.shape
        rows = hidden.view(batch, channels, height * width).transpose(1, 2)
        hidden = hidden + self.tokens(rows).transpose(1, 2).view(batch, channels, height, width)
        return image + self.up(nn.functional.interpolate(hidden, scale_factor=2.0))


class Flat(nn.Module):
    """Spellings that the dialect changes: flatten, unflatten, view_as, expand_as."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        rows = image.flatten(2).unflatten(1, (3, 1)).flatten(0, 1)
        return rows.view_as(image) * self.scale.expand_as(image)


class Fixing(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        table = torch.arange(image.shape[3] * int(image.shape[2] == 12) + 20)[: image.shape[3]]
        return image * float(image.shape[2]) + table


class Bounded(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image + 1 if image.shape[0] < 4 else image - 1


class Squeezing(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.squeeze(0) * 2


def open_program(build: Factory, *sizes: int | str, step: int = 0) -> tuple[Program, nn.Module]:
    torch.manual_seed(0)
    real = randomised(build().eval())
    fake, mode = build_fake(build)
    inputs = Inputs(
        {"image": Input(("batch", 3, "height", "width"))},
        {"batch": 1, "height": 16, "width": 16},
        steps={"height": step, "width": step} if step else {},
    )
    example = inputs.arguments({"image": [size_from(size, "image") for size in sizes]}, {}, torch.float32)
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    return export_program(fake, mode, example, weights, Origin("test")), real


def check(program: Program, real: nn.Module, *shapes: tuple[int, ...]) -> None:
    module = program_module(program)
    for shape in shapes:
        image = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        with torch.no_grad():
            expected = real(image)
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(module(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [0, 2])
def test_every_size_in_range_equals_eager(step: int) -> None:
    program, real = open_program(Halving, "1..4", 3, "8..64", "8..64", step=step)
    batch, height, width = program.entries["full"].dimensions
    assert (batch.minimum, batch.maximum, batch.step) == (1, 4, 1)
    assert [(item.minimum, item.maximum, item.step) for item in (height, width)] == [(8, 64, 2)] * 2
    assert height.example != width.example
    check(program, real, (1, 3, 8, 8), (1, 3, 16, 16), (4, 3, 64, 64), (3, 3, 10, 62))
    verify_shapes(program)


def test_sizes_of_other_spellings_are_computed() -> None:
    program, real = open_program(Flat, "1..8", 3, "4..32", "4..32")
    check(program, real, (1, 3, 4, 4), (8, 3, 32, 5), (3, 3, 7, 7))


def test_interface_names_the_dimensions() -> None:
    program, _ = open_program(Halving, "1..4", 3, "8..64:2", 20)
    graph = program.entries["full"]
    assert graph.inputs[0].shape == ("batch", 3, "height", 20)
    assert graph.outputs[0].shape == ("batch", 3, "height", 20)
    assert [spec.shape for spec in graph.inputs_at({"height": 30})] == [(2, 3, 30, 20)]


def test_costs_count_at_the_captured_sizes() -> None:
    program, _ = open_program(Halving, "2..4", 3, "16..64:2", "18..64:2")
    fixed, _ = open_program(Halving, 2, 3, 16, 18)
    assert program.entries["full"].dimensions.examples == {"batch": 2, "height": 16, "width": 18}
    assert measure(program).totals == measure(fixed).totals


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (1, 3, 17, 16), (1, 3, 16, 66), (1, 3, 6, 16)])
def test_a_call_outside_the_range_is_refused(shape: tuple[int, ...]) -> None:
    program, _ = open_program(Halving, "1..4", 3, "8..64", "8..64", step=2)
    with pytest.raises(UserError, match="and the engine was built for"):
        program_module(program)(torch.randn(shape))


def test_a_size_that_the_code_fixes_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"Fixing cannot keep height open: .*give it a fixed size"):
        open_program(Fixing, 2, 3, "8..16", 20)


def test_a_range_that_the_model_takes_in_part_is_refused_with_the_part() -> None:
    with pytest.raises(UserError, match=r"Bounded takes batch from 1 to 3, not 1..8; narrow the range"):
        open_program(Bounded, "1..8", 3, 8, 12)


def test_a_range_without_a_multiple_of_the_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"height is a multiple of 8 in this model; 9..15 holds at most one"):
        open_program(Halving, 1, 3, "9..15", 16, step=8)


def test_a_range_from_one_is_refused_where_one_is_squeezed_away() -> None:
    with pytest.raises(UserError, match=r"Squeezing returns other dimensions when batch is 1 .*begin at 2"):
        open_program(Squeezing, "1..4", 3, 8, 12)
    program, real = open_program(Squeezing, "2..4", 3, 8, 12)
    check(program, real, (2, 3, 8, 12), (4, 3, 8, 12))


def test_a_saved_program_keeps_its_ranges(tmp_path: Path) -> None:
    program, real = open_program(Halving, "1..4", 3, "8..64", "8..64", step=2)
    save_program(program, tmp_path / "program")
    loaded = load_program(tmp_path / "program")
    assert loaded.entries["full"].dimensions == program.entries["full"].dimensions
    assert loaded.entries["full"].inputs == program.entries["full"].inputs
    assert measure(loaded).totals == measure(program).totals
    check(loaded, real, (1, 3, 8, 8), (4, 3, 64, 32))


def test_evil_sizes_in_a_saved_program_are_refused(tmp_path: Path) -> None:
    import zipfile

    program, _ = open_program(Halving, "1..4", 3, 16, 20)
    save_program(program, tmp_path / "program")
    archive = tmp_path / "program" / "full.pt2"
    with zipfile.ZipFile(archive) as source:
        entries: dict[str, Any] = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(archive, "w") as target:
        for name, data in entries.items():
            if name.endswith("models/model.json"):
                data = data.replace(b"Symbol('s", b"exit(3) or Symbol('s")
            target.writestr(name, data)
    with pytest.raises(UserError, match="is no size; refused"):
        load_program(tmp_path / "program")
