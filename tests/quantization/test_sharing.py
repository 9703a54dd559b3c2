"""What devices of integers alone hand on keeps its integers: one quantiser, no value between a product and its ReLU."""

from __future__ import annotations

import pytest
import torch
from quantized_nets import Handing
from torch import Tensor, nn

from optpass.evaluate.calibration_set import random_set
from optpass.evaluate.difference import program_runner, tensor_difference
from optpass.ir.program import Program
from optpass.ir.quantized import DEQUANTIZE, QUANTIZE, Quantizer, quantizer_of
from optpass.quantization.form import INTEGER
from optpass.quantization.program import Quantization
from optpass.quantization.ranges import Method
from optpass.testing import capture_module


@pytest.fixture(scope="module")
def quantized() -> Program:
    program = capture_module(Handing, image=torch.zeros(2, 3, 8, 8))[0]
    placed = Quantization.placed(program, INTEGER, reason=lambda graph: lambda node: "", scheme=Quantization.scheme)
    return placed.calibrated(program, random_set(program, count=4, seed=0), Method("minmax")).applied(program)


def test_a_product_and_its_activation_are_one(quantized: Program) -> None:
    (stem, added) = (node for node in quantized.entries["full"].calls if node.target is torch.ops.aten.relu.default)
    assert stem.args[0].target is torch.ops.aten.conv2d.default  # type: ignore[union-attr]
    assert added.args[0].target is DEQUANTIZE  # type: ignore[union-attr]


def test_what_is_handed_on_has_one_quantiser(quantized: Program) -> None:
    aten = torch.ops.aten
    handing = (aten.relu.default, aten.max_pool2d.default, aten.select.int, aten.cat.default, aten.split.Tensor)
    seen = []
    for node in quantized.entries["full"].calls:
        read = [each for each in node.all_input_nodes if each.target is DEQUANTIZE]
        if node.target in handing and read:
            results = node.users if node.target is aten.split.Tensor else [node]
            given = {quantizer_of(user) for each in results for user in each.users if user.target is QUANTIZE}
            assert {quantizer_of(each) for each in read} == given
            assert len(given) == 1
            seen.append(node.target)
    assert sorted(map(str, seen)) == sorted(map(str, handing))


def test_integers_handed_on_as_they_are_give_the_same(quantized: Program) -> None:
    """ReLU, pooling, enlarging and joining of integers, without a scale, beside the same between real values."""
    graph = quantized.entries["full"]
    cat = next(node for node in graph.calls if node.target is torch.ops.aten.cat.default)
    (joined,) = {quantizer_of(user) for user in cat.users}
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randint(-128, 128, (1, 8, 8, 8), generator=generator) for _ in range(2))

    def real(integers: Tensor, quantizer: Quantizer) -> Tensor:
        return (integers - quantizer.zero_point) * quantizer.scale

    def hand_on(one: Tensor, other: Tensor, least: float) -> Tensor:
        pooled = nn.functional.max_pool2d(one.clamp_min(least).float(), 2)
        return torch.cat([nn.functional.interpolate(pooled, scale_factor=2.0), other.float()], 1)

    expected = hand_on(real(one, joined), real(other, joined), 0.0)
    found = real(hand_on(one, other, joined.zero_point), joined)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert min(joined.zero_point - joined.low, joined.high - joined.zero_point) >= 0


def test_it_is_near_what_it_was(quantized: Program) -> None:
    program = capture_module(Handing, image=torch.zeros(2, 3, 8, 8))[0]
    (inputs,) = random_set(program, count=1, seed=0).entries["full"]
    expected = program_runner(program, "full")(inputs)["output"]
    found = program_runner(quantized, "full")(inputs)["output"]
    # The joined values have the steps of the largest among them.
    assert tensor_difference(expected, found).snr >= 15
