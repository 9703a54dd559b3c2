"""Quantised values against torch's own operators, and weights alone against NNCF's compression."""

from __future__ import annotations

import pytest
import torch

from optpass.ir.quantized import DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS, INT32, Quantized, Steps, ZeroPoints
from optpass.ir.weights import Constant, Scale
from optpass.quantization.form import WeightScheme

INT8 = (-127, 127)


def weight(*shape, dtype=torch.float32):
    return Constant((torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.05).to(dtype))


def grouped(expression, scheme):
    """The integers, steps and zero points of a matrix by ``scheme``."""
    groups = expression.shape[1] // scheme.group_size if scheme.group_size else 0
    steps = Steps(expression, 0, *scheme.bounds, scheme.symmetric, groups)
    zero = None if scheme.symmetric else ZeroPoints(expression, 0, *scheme.bounds, groups)
    return Quantized(expression, steps, zero, 0, *scheme.bounds, scheme.dtype), steps, zero


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3, 3), 0), ((4, 6, 3, 3), 1), ((6, 5), 0)])
def test_channels_are_those_of_torch(shape, axis):
    expression = weight(*shape)
    steps = Steps(expression, axis, *INT8)
    integers = Quantized(expression, steps, None, axis, *INT8)
    scale, found = steps.evaluate(), integers.evaluate()
    assert steps.shape == (6,)
    assert torch.equal(scale, expression.value.movedim(axis, 0).flatten(1).abs().amax(1) / 127)
    theirs = torch.quantize_per_channel(expression.value, scale, torch.zeros(6, dtype=torch.int64), axis, torch.qint8)
    assert torch.equal(found, theirs.int_repr())
    assert (found.shape, found.dtype, integers.bits) == (torch.Size(shape), torch.int8, 8)
    real = DEQUANTIZE_CHANNELS(found, scale, None, axis, *INT8, torch.int8)
    assert torch.allclose(real, theirs.dequantize())
    assert ((real - expression.value).abs().movedim(axis, 0).flatten(1).amax(1) <= scale / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0, 8])
def test_what_comes_back_is_within_half_a_step(bits, symmetric, size):
    expression, scheme = weight(6, 32), WeightScheme(bits, symmetric, size)
    integers, steps, zero = grouped(expression, scheme)
    found, scale = integers.evaluate(), steps.evaluate()
    assert integers.bits == bits
    assert found.dtype == (torch.int8 if symmetric else torch.uint8)
    points = None if zero is None else zero.evaluate()
    if size:
        arguments = (*scheme.bounds, scheme.dtype, size, torch.float32)
        real = DEQUANTIZE_GROUPS(found, scale, points, *arguments)
    else:
        real = DEQUANTIZE_CHANNELS(found, scale, points, 0, *scheme.bounds, scheme.dtype)
    error = (real - expression.value).abs().reshape(6, -1, size or 32).amax(-1)
    # A zero point is rounded, and of four bits there is one integer more below than above: half a step may lie outside.
    assert (error <= scale.reshape(6, -1).abs() * (0.5001 if symmetric and bits == 8 else 1.0001)).all()
    assert error.max() > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0, 8])
def test_weights_alone_are_those_of_nncf(symmetric, size):
    from nncf import CompressWeightsMode
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.weight_lowering import do_integer_quantization
    from nncf.tensor import Tensor

    mode = CompressWeightsMode.INT4_SYM if symmetric else CompressWeightsMode.INT4_ASYM
    expression, scheme = weight(6, 32), WeightScheme(4, symmetric, size)
    theirs = do_integer_quantization(Tensor(expression.value), WeightCompressionConfig(mode, size or -1), 1)
    integers, steps, zero = grouped(expression, scheme)
    assert torch.allclose(steps.evaluate().flatten(), theirs.scale.data.float().flatten(), rtol=1e-5)
    assert torch.equal(integers.evaluate().flatten().int(), theirs.tensor.data.flatten().int())
    if zero is not None:
        assert torch.equal(zero.evaluate().flatten(), theirs.zero_point.data.flatten().int())


def test_channels_without_values_have_a_step_of_one():
    expression = Constant(torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, 3.0]]))
    steps = Steps(expression, 0, 0, 15, symmetric=False)
    zero = ZeroPoints(expression, 0, 0, 15)
    assert torch.allclose(steps.evaluate(), torch.tensor([1.0, 0.2, 0.2]))
    assert zero.evaluate().tolist() == [0, 10, 0]
    assert Quantized(expression, steps, zero, 0, 0, 15, torch.uint8).evaluate().tolist() == [[0, 0], [15, 0], [15, 15]]
    assert Steps(Constant(torch.zeros(2, 3)), 0, *INT8).evaluate().tolist() == [1.0, 1.0]


def test_biases_of_32_bits_are_exact_to_their_step():
    bias = Constant(torch.tensor([1.0, -3.0, 1e-5, 20_000.0]))
    scale = Scale(Constant(torch.tensor([0.5, 0.25, 1e-5, 0.001])), 1e-3)
    found = Quantized(bias, scale, None, 0, *INT32, torch.int32)
    steps = scale.evaluate().double()
    expected = torch.round(bias.value.double() / steps).clamp(*INT32).to(torch.int32)
    assert torch.equal(found.evaluate(), expected)
    assert found.bits == 32
    # Beyond 32 bits they saturate.
    assert Quantized(bias, Scale(scale, 1e-3), None, 0, *INT32, torch.int32).evaluate()[3] == INT32[1]


def test_half_precision_is_read_in_float32():
    half = weight(4, 8, dtype=torch.float16)
    steps = Steps(half, 0, *INT8)
    assert steps.evaluate().dtype == torch.float32
    wide = Constant(half.value.float())
    found = Quantized(half, steps, None, 0, *INT8)
    assert torch.equal(found.evaluate(), Quantized(wide, Steps(wide, 0, *INT8), None, 0, *INT8).evaluate())


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot be cut into 3 groups"):
        _ = Steps(weight(4, 8), 0, *INT8, groups=3).shape
    with pytest.raises(ValueError, match="does not fit a weight"):
        Quantized(weight(4, 8), Constant(torch.ones(8)), None, 0, *INT8)


def test_texts_tell_the_parameters():
    expression = weight(4, 8)
    steps = Steps(expression, 0, 0, 15, symmetric=False, groups=2)
    found = Quantized(expression, steps, ZeroPoints(expression, 0, 0, 15, 2), 0, 0, 15, torch.uint8)
    assert str(steps).endswith("axis=0, 0…15, groups=2)")
    assert str(found).endswith("axis=0, 0…15, asymmetric)")
    assert found.operands()[0] is expression
