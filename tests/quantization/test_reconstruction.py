"""One operator's integers, against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantized_nets import Hybrid

from optpass.ir.quantized import Quantizer
from optpass.quantization.form import CPU, INTEGER, PORTABLE
from optpass.quantization.placement import place
from optpass.quantization.reconstruction import (
    MULTIPLES,
    QuantizedOperator,
    Sample,
    Setting,
    quantized,
    reconstruct,
)
from optpass.testing import capture_module


def operator(path, skewed=False):
    """The operator at ``path`` of the hybrid network, its real function, and inputs of it."""
    program, _ = capture_module(lambda: Hybrid(skewed), x=torch.zeros(1, 3, 6, 6))
    placement = place(program.entries["full"], PORTABLE, lambda node: "")
    (weight,) = (w for w in placement.weights if str(w.read.target) == f"{path}.weight")
    value, bias = (program.weights[f"{path}.{name}"].evaluate() for name in ("weight", "bias"))
    node = weight.operator
    made = QuantizedOperator(node, value, weight.axis, [bias, *node.args[3:]])
    generator = torch.Generator().manual_seed(0)
    shape = (1, 36, 16) if path == "qkv" else (1, 16, 6, 6)
    inputs = [torch.randn(shape, generator=generator).exp() for _ in range(3)]
    if skewed:
        inputs = [x * torch.logspace(-2, 1, 16).reshape(-1, 1, 1) for x in inputs]
    return made, [Sample(x, node.target(x, value, bias, *node.args[3:])) for x in inputs]


def extremes(samples, form):
    """The setting that the extremes give."""
    low, high = form.bounds
    least, most = min(float(s.value.min()) for s in samples), max(float(s.value.max()) for s in samples)
    step = max(-least, most) / high if form.symmetric else (max(most, 0) - min(least, 0)) / (high - low)
    zero = 0 if form.symmetric else round(low - min(least, 0) / step)
    return Setting(Quantizer(step, zero, low, high, form.dtype))


def error(made, samples, setting):
    """By its definition."""
    return sum(
        float(((made(sample.value, setting) - sample.target) * weighing(sample)).double().square().sum())
        for sample in samples
    )


def weighing(sample):
    return 1 if sample.importance is None else sample.importance


def test_multiples_are_the_published_ones():
    assert len(MULTIPLES) == 101
    assert MULTIPLES[0] == 0.01
    assert MULTIPLES[-1] == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("form", "path", "skewed"),
    [(PORTABLE, "qkv", False), (CPU, "bridge", False), (CPU, "bridge", True), (INTEGER, "bridge", True)],
)
def test_the_error_never_grows(path, skewed, form):
    made, samples = operator(path, skewed)
    start = extremes(samples, form)
    found = reconstruct(made, samples, start, form)
    assert found.before == pytest.approx(error(made, samples, start), rel=1e-3)
    assert found.after == pytest.approx(error(made, samples, found.setting), rel=1e-3)
    assert found.after < 0.99 * found.before
    quantizer = found.setting.quantizer
    assert (quantizer.low, quantizer.high, quantizer.dtype) == (*form.bounds, form.dtype)
    assert not form.symmetric or quantizer.zero_point == 0


def test_each_channel_has_the_best_of_its_own():
    made, samples = operator("qkv")
    start = extremes(samples, PORTABLE)
    found = reconstruct(made, samples, start, PORTABLE).setting
    by_hand = []
    for multiple in MULTIPLES:
        tried = replace(found, multiples=torch.full((48,), multiple))
        missing = [made(sample.value, tried) - sample.target for sample in samples]
        by_hand.append(torch.cat(missing).double().square().sum((0, 1)))
    chosen = torch.cat([made(sample.value, found) - sample.target for sample in samples]).double().square().sum((0, 1))
    assert bool((chosen <= torch.stack(by_hand).amin(0) * 1.001).all())


@pytest.mark.parametrize(("form", "factored"), [(PORTABLE, True), (CPU, True), (INTEGER, False)])
def test_a_depthwise_convolution_may_have_a_step_for_each_channel(form, factored):
    made, samples = operator("bridge", skewed=True)
    found = reconstruct(made, samples, extremes(samples, form), form)
    assert (found.setting.factor is not None) == factored
    if factored:
        assert found.after < 0.4 * found.before
        scaled = torch.cat([sample.value for sample in samples]) * found.setting.factor
        assert torch.allclose(scaled.abs().amax((0, 2, 3)), scaled.abs().max(), rtol=1e-5)
    dense, values = operator("bridge")
    assert reconstruct(dense, values, extremes(values, form), form).setting.factor is None


def test_what_an_error_weighs_is_heeded():
    made, samples = operator("qkv")
    start = extremes(samples, PORTABLE)
    # The small tenth of the input's elements is all that counts.
    weights = [(s.value.amax(-1, keepdim=True) < 2.5).float().expand_as(s.target) for s in samples]
    assert 0 < sum(float(weight.sum()) for weight in weights) < 0.3 * sum(weight.numel() for weight in weights)
    weighted = [replace(sample, importance=weight) for sample, weight in zip(samples, weights, strict=True)]
    found = reconstruct(made, weighted, start, PORTABLE)
    plain = reconstruct(made, samples, start, PORTABLE)
    assert found.setting.quantizer.scale < 0.8 * plain.setting.quantizer.scale
    assert error(made, weighted, found.setting) < 0.5 * error(made, weighted, plain.setting)


def test_weights_that_are_settled_stay():
    made, samples = operator("qkv")
    start = replace(extremes(samples, PORTABLE), multiples=torch.linspace(0.5, 1, 48))
    found = reconstruct(made, samples, start, PORTABLE, of_weight=False)
    assert found.setting.multiples is start.multiples
    assert found.after <= found.before


def test_corrected_biases_leave_no_mean_error():
    made, samples = operator("qkv")
    coarse = extremes(samples, PORTABLE)
    setting = replace(coarse, quantizer=replace(coarse.quantizer, scale=coarse.quantizer.scale * 4))
    bias = made.corrected_bias(samples, setting)
    shift = bias - made._others[0]
    missing = torch.cat([sample.target - made(sample.value, setting) for sample in samples]).mean((0, 1))
    assert float(missing.abs().max()) > 1e-3
    assert torch.allclose(shift, missing, atol=1e-5)


def test_calls_of_other_shapes_are_taken_one_by_one():
    made, samples = operator("bridge")
    other = replace(samples[0], value=samples[0].value[..., :5], target=samples[0].target[..., :5])
    mixed = [samples[0], other, samples[1]]
    start = extremes(mixed, PORTABLE)
    assert reconstruct(made, mixed, start, PORTABLE).before == pytest.approx(error(made, mixed, start), rel=1e-3)


def test_quantised_values_are_what_the_quantiser_says():
    setting = Setting(extremes([Sample(torch.tensor([-1.0, 3.0]), torch.zeros(2))], CPU).quantizer)
    value, found = torch.linspace(-2, 4, 50), setting.quantizer
    integers = (torch.round(value / found.scale) + found.zero_point).clamp(found.low, found.high)
    assert torch.allclose(quantized(value, setting), (integers - found.zero_point) * found.scale)
