"""Which weights of a checkpoint fit a graph, and what is said about those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.errors import WeightError
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Cast, Constant


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))[:, self.order]


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {**Net().state_dict(), "norm.weight": torch.rand(6) + 0.5, "norm.bias": torch.rand(6)}


def bound(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Program:
    module, mode = build_fake(Net, dtype)
    checkpoint = {name: Constant(tensor) for name, tensor in weights.items()}
    return export_program(module, mode, {"x": torch.zeros(2, 4, dtype=dtype)}, checkpoint, Origin("test"))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_weights_with_full_precision_norms_are_computed_in_the_capture_dtype(half: torch.dtype) -> None:
    mixed = {name: tensor.to(half) if "proj" in name else tensor for name, tensor in state().items()}
    program = bound(mixed)
    assert {weight.dtype for name, weight in program.weights.items() if name != "order"} == {torch.float32}
    assert isinstance(program.weights["proj.weight"], Cast)
    assert isinstance(program.weights["norm.weight"], Constant)
    eager = Net()
    eager.load_state_dict(mixed)
    x = torch.randn(2, 4)
    graph = program.entries["full"]
    torch.testing.assert_close(graph.module(program.weights)(x)[0], eager(x))


def test_wide_weights_are_rounded_once_into_a_half_precision_capture() -> None:
    weights = {**state(), "norm.weight": torch.rand(6, dtype=torch.float64)}
    found = bound(weights, torch.bfloat16).weights["norm.weight"].evaluate()
    assert torch.equal(found, weights["norm.weight"].to(torch.bfloat16))


def test_eight_bit_floats_without_a_scale_are_values() -> None:
    weights = state()
    eighth = weights["proj.weight"].to(torch.float8_e4m3fn)
    found = bound({**weights, "proj.weight": eighth}).weights["proj.weight"].evaluate()
    assert torch.equal(found, eighth.float())


@pytest.mark.parametrize("scale", ["proj.weight_scale", "proj.weight_scale_inv", "proj.scale_weight"])
def test_eight_bit_floats_with_a_scale_are_refused(scale: str) -> None:
    weights = state()
    quantized = {**weights, "proj.weight": weights["proj.weight"].to(torch.float8_e4m3fn), scale: torch.ones(1)}
    with pytest.raises(WeightError, match=rf"proj\.weight: f8_e4m3 that {scale} scales"):
        bound(quantized)


@pytest.mark.parametrize("narrow", [torch.uint8, torch.int16, torch.int32])
def test_integers_widen(narrow: torch.dtype) -> None:
    assert bound({**state(), "order": torch.arange(6).to(narrow)}).weights["order"].evaluate().dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("proj.weight", torch.zeros(6, 4, dtype=torch.int8), r"proj\.weight: the model has f32, the checkpoint i8"),
        ("norm.bias", torch.zeros(6, dtype=torch.bool), r"norm\.bias: the model has f32, the checkpoint bool"),
        ("norm.bias", torch.zeros(6, dtype=torch.complex64), r"norm\.bias: the model has f32, the checkpoint c64"),
        ("order", torch.zeros(6), r"order: the model has i64, the checkpoint f32"),
        ("order", torch.zeros(6, dtype=torch.uint64), r"order: the model has i64, the checkpoint uint64"),
        ("order", torch.zeros(6, dtype=torch.complex64), r"order: the model has i64, the checkpoint c64"),
        ("proj.weight", torch.zeros(4, 6), r"proj\.weight: the model has \[6, 4\], the checkpoint \[4, 6\]"),
    ],
)
def test_a_weight_that_does_not_fit_is_named_with_both_sides(name: str, wrong: Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=rf"1 weights do not fit the model: {message}"):
        bound({**state(), name: wrong})


def test_every_weight_that_does_not_fit_is_counted() -> None:
    wrong = {name: torch.zeros(1) for name in state()}
    with pytest.raises(WeightError, match=r"5 weights do not fit the model: proj\.weight.*proj\.bias.*norm\.weight"):
        bound(wrong)
