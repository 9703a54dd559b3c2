"""The pass ``quantize``: what it puts where, how near the result is, what it refuses."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from denoisers import sampled
from quantized_nets import Attention, Residual
from torch import nn

from optpass.capture.spans import Span
from optpass.errors import MissingValuesError, UserError
from optpass.evaluate.calibration_set import random_set
from optpass.evaluate.difference import program_difference, program_runner, tensor_difference
from optpass.ir.quantized import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from optpass.ir.text import graph_text
from optpass.ir.weights import Absent, WeightStore
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.quantize import Quantize
from optpass.passes.reparameterize import Reparameterize
from optpass.pipeline.lowered import lowered_runners
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.targets.openvino import OpenVino
from optpass.testing import capture_module

CALLS = 6
GOLDEN_INT8 = """\
graph(x: f32[3, 4]):
  %q = q(%x, S, 0, -128, 127, i8) : i8[3, 4]  ; (root)
  %deq = deq(%q, S, 0, -128, 127, i8) : f32[3, 4]  ; (root)
  %deq_axis = deq_axis(@one.weight_int8, @one.weight_scale, None, 0, -127, 127, i8) : f32[6, 4]  ; one
  %linear = linear(%deq, %deq_axis, @one.bias) : f32[3, 6]  ; one
  %relu = relu(%linear) : f32[3, 6]  ; (root)
  %q_1 = q(%relu, S, 0, -128, 127, i8) : i8[3, 6]  ; (root)
  %deq_1 = deq(%q_1, S, 0, -128, 127, i8) : f32[3, 6]  ; (root)
  %deq_axis_1 = deq_axis(@two.weight_int8, @two.weight_scale, None, 0, -127, 127, i8) : f32[2, 6]  ; two
  %linear_1 = linear(%deq_1, %deq_axis_1) : f32[3, 2]  ; two
  return output=%linear_1""".splitlines()
GOLDEN_W4 = """\
graph(x: f32[3, 4]):
  %deq_axis_group = deq_axis_group(@one.weight_int4, @one.weight_scale, None, -8, 7, i8, 2, f32) : f32[6, 4]  ; one
  %linear = linear(%x, %deq_axis_group, @one.bias) : f32[3, 6]  ; one
  %relu = relu(%linear) : f32[3, 6]  ; (root)
  %deq_axis_group_1 = deq_axis_group(@two.weight_int4, @two.weight_scale, None, -8, 7, i8, 2, f32) : f32[2, 6]  ; two
  %linear_1 = linear(%relu, %deq_axis_group_1) : f32[3, 2]  ; two
  return output=%linear_1""".splitlines()


@pytest.fixture(scope="module")
def residual():
    return capture_module(Residual, x=torch.zeros(2, 3, 16, 16))[0]


@pytest.fixture(scope="module")
def attention():
    return capture_module(Attention, x=torch.zeros(2, 6, 16), timestep=torch.zeros(2))[0]


@pytest.fixture
def dataset(monkeypatch):
    """A module ``given`` with ``data`` in it."""
    module = ModuleType("given")
    module.data = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    monkeypatch.setitem(sys.modules, "given", module)
    return module


def quantised(program, target=None, **options):
    return run_pass(program, Step("quantize", Quantize(**{"calls": CALLS, **options})), target=target)


def operators(program, entry="full"):
    return [node.target for node in program.entries[entry].calls]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def small():
    return capture_module(Small, x=torch.zeros(3, 4))[0]


def shortened(program):
    """Scales of activations are measured, all else of a text is certain; long names would break its lines."""
    text = graph_text(program.entries["full"]).replace("quantized_decomposed.", "")
    text = re.sub(r"(_tensor\(%\w+), [\d.e-]+,", r"\1, S,", text)
    for word, short in (("quantize_per_tensor", "q"), ("quantize_per_channel", "q_axis"), ("_default", "")):
        text = text.replace(word, short)
    return text.splitlines()


def test_golden(small):
    after, record = quantised(small, bias_correction="none")
    assert shortened(after) == GOLDEN_INT8
    assert record.modified
    assert record.sites == ("one", "two")
    assert after.weights["two.weight_int8"].evaluate().dtype == torch.int8
    used = ["one.weight_int8", "one.weight_scale", "one.bias", "two.weight_int8", "two.weight_scale"]
    assert set(after.weights) == set(used)


def test_golden_of_weights_alone(small):
    after, record = quantised(small, scheme="w4", group_size=2)
    assert shortened(after) == GOLDEN_W4
    assert "calibration_set" not in record.facts


@pytest.mark.parametrize(
    ("options", "real", "reason"),
    [
        ({"keep": "st*"}, ["stem"], "kept, as asked"),
        ({"match": ("one", "two")}, ["stem", "last", "head"], "not in match"),
        ({"keep_facts": ("first", "last")}, ["stem", "head"], "kept, as "),
    ],
)
def test_scopes(residual, options, real, reason):
    after, record = quantised(residual, **options)
    assert [declined.path for declined in record.declined] == real
    assert all(declined.reason.startswith(reason) for declined in record.declined)
    for name in ("stem", "one", "two", "last", "head"):
        assert (f"{name}.weight" in after.used_weights()) == (name in real)


@pytest.mark.parametrize(("fact", "real"), [("embedding", {"time"}), ("attention", {"q", "k", "v", "out"})])
def test_scopes_by_what_operators_are(attention, fact, real):
    _, record = quantised(attention, keep_facts=fact)
    assert {declined.path for declined in record.declined} == real


def test_the_form_is_the_targets(residual):
    on_cpu, _ = quantised(residual, OnnxRuntime())
    portable, _ = quantised(residual)
    asked, _ = quantised(residual, OnnxRuntime(), form="portable")

    def dtypes(program):
        return {node.args[5] for node in program.entries["full"].calls if node.target == QUANTIZE}

    assert dtypes(on_cpu) == {torch.uint8}
    assert dtypes(portable) == dtypes(asked) == {torch.int8}
    assert all(node.args[2] == 0 for node in portable.entries["full"].calls if node.target == QUANTIZE)
    assert sum(name.endswith("_int32") for name in on_cpu.weights) == 5
    assert not any(name.endswith("_int32") for name in portable.weights)


@pytest.mark.parametrize("form", ["portable", "cpu", "integer"])
@pytest.mark.parametrize("net", ["residual", "attention"])
def test_int8_is_near_the_real_model(request, net, form):
    program = request.getfixturevalue(net)
    after, _ = quantised(program, form=form, estimator="minmax", calls=32)
    assert program_difference(program, after).snr >= (28 if form != "integer" else 25)


@pytest.mark.parametrize("net", ["residual", "attention"])
def test_activations_of_16_bits_leave_the_error_of_the_weights(request, net):
    program = request.getfixturevalue(net)
    wide, _ = quantised(program, form="integer", activations=16, calls=32)
    narrow, _ = quantised(program, form="integer", estimator="minmax", calls=32)
    quantisers = [node.args for node in wide.entries["full"].calls if node.target == QUANTIZE]
    assert {arguments[3:] for arguments in quantisers} == {(0, 65535, torch.uint16)}
    weights_alone = replace(wide, entries={"full": _with_real_activations(wide.entries["full"])})
    # A call of the calibration: others may leave its ranges.
    (inputs,) = random_set(program, count=1, seed=0).entries["full"]
    real, alone, found, coarse = (
        program_runner(each, "full")(inputs)["output"] for each in (program, weights_alone, wide, narrow)
    )
    assert tensor_difference(alone, found).snr >= 60
    assert tensor_difference(real, found).snr >= tensor_difference(real, coarse).snr + 2


def _with_real_activations(graph):
    """``graph`` with integers at weights alone."""
    own = graph.copy()
    for node in own.calls:
        if node.target == DEQUANTIZE:
            node.replace_all_uses_with(node.args[0].args[0])
    own.remove_dead_code()
    return own


def test_a_target_without_kernels_for_16_bits_refuses_them(residual):
    with pytest.raises(UserError, match="activations: 16: the target has no kernels for them; qnn has"):
        quantised(residual, OpenVino(), activations=16)


ENGINES = [
    (OnnxRuntime, "residual", {}),
    (OnnxRuntime, "attention", {"form": "integer", "activations": 16}),
    (OpenVino, "residual", {"form": "portable"}),
    (OnnxRuntime, "attention", {"scheme": "w4", "group_size": 8, "keep": "time"}),
]
SLOW_ENGINES = [
    (OpenVino, "residual", {}),
    (OnnxRuntime, "attention", {"smooth": True}),
    (OpenVino, "attention", {"smooth": True}),
    (OnnxRuntime, "attention", {"scheme": "w8"}),
    (OpenVino, "attention", {"scheme": "w4", "group_size": 8, "keep": "time"}),
    (OnnxRuntime, "attention", {"scheme": "w4", "group_size": 0, "symmetric": False}),
    (OnnxRuntime, "attention", {"scheme": "w4", "group_size": 0}),
    (OpenVino, "attention", {"scheme": "w4", "group_size": 0, "symmetric": False}),
]


@pytest.mark.parametrize(
    ("target", "net", "options"), [*ENGINES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_ENGINES)]
)
def test_engines_give_what_the_graph_says(request, tmp_path, target, net, options):
    program, engine = request.getfixturevalue(net), target()
    after, _ = quantised(program, engine, **options)
    run = lowered_runners(engine, after, tmp_path)["full"]
    for inputs in random_set(program, count=2, seed=3).entries["full"]:
        expected = program_runner(after, "full")(inputs)["output"]
        # ONNX Runtime's product with 4-bit weights rounds activations as well.
        bound = 30 if options.get("group_size") == 0 else 40
        assert tensor_difference(expected, run(inputs)["output"]).snr >= bound


def test_smoothing_moves_factors_and_changes_nothing_else(attention):
    after, _ = quantised(attention, smooth=True, estimator="minmax")
    factors = [name for name in after.weights if name.endswith("_smoothing")]
    assert factors
    for name in factors:
        weight = name.removesuffix("_smoothing")
        (moved,) = (after.weights[f"{weight}_int8"].operands()[0],)
        restored = moved.evaluate() * after.weights[name].evaluate()
        assert torch.allclose(restored, attention.weights[weight].evaluate(), rtol=1e-5)
    factored = [node for node in after.entries["full"].calls if node.target is torch.ops.aten.mul.Tensor]
    assert {str(node.args[1].target) for node in factored} == set(factors)
    assert all(user.target == QUANTIZE for node in factored for user in node.users)


@pytest.mark.parametrize("correction", ["none", "fast", "full"])
def test_corrected_biases_lower_the_mean_error_of_their_operator(residual, correction):
    calls = random_set(residual, count=16, seed=0).entries["full"]
    run, real = {}, program_runner(residual, "full")
    for name in ("none", correction):
        after, _ = quantised(residual, match="head", bias_correction=name, estimator="minmax", calls=16)
        run[name] = program_runner(after, "full")
    assert ("head.bias_corrected" in after.weights) == (correction != "none")
    before, found = (
        torch.cat([run[name](call)["output"] - real(call)["output"] for call in calls]).mean(0).norm()
        for name in ("none", correction)
    )
    assert (found < 0.5 * before) == (correction != "none")


@pytest.mark.parametrize(
    "options",
    [{"scheme": "w8", "group_size": 0}, pytest.param({"calls": 2, "bias_correction": "none"}, marks=pytest.mark.slow)],
)
def test_entries_of_a_loop_share_their_integers(tmp_path, options):
    program, _ = sampled("DiT-XL/2", tmp_path, layers=2)
    cached, _ = run_pass(program, Step("cache-blocks", CacheBlocks(head=1, every=2)))
    assert len(cached.entries) > 1
    after, record = quantised(cached, **options)
    integers = [name for name in after.weights if "_int8" in name]
    assert len(integers) == len({name.rpartition("_int8")[0] for name in integers})
    for name, graph in cached.entries.items():
        weighted = [node for node in after.entries[name].calls if node.target == DEQUANTIZE_CHANNELS]
        assert len(weighted) >= 2
        assert any(site.startswith(f"{name}:") for site in record.sites) or name == "full"
        assert after.entries[name].signature == graph.signature
    assert after.used_weights().nbytes < 0.5 * cached.used_weights().nbytes


def test_open_sizes_stay_open(capture_shared):
    program = capture_shared(Residual, {"x": ("batch", 3, "high", 16)}, {"batch": Span(1, 4), "high": Span(4, 32)})
    after, _ = quantised(program, form="cpu", estimator="minmax", calls=16)
    assert after.entries["full"].dimensions == program.entries["full"].dimensions
    found = program_runner(after, "full")({"x": torch.randn(3, 3, 20, 16)})
    assert found["output"].shape == (3, 8)
    assert program_difference(program, after).snr >= 25


def test_what_was_quantised_is_refused_again(small):
    after, _ = quantised(small)
    with pytest.raises(UserError, match="the model is quantised already"):
        quantised(after)


def test_nothing_in_scope_changes_nothing(small):
    after, record = quantised(small, keep="*")
    assert not record.modified
    assert graph_text(after.entries["full"]) == graph_text(small.entries["full"])
    assert {declined.path for declined in record.declined} == {"one", "two"}


def test_a_replay_gives_the_same(residual, dataset):
    after, record = quantised(residual, data="given:data")
    assert record.record.calibration == record.facts["calibration_set"]["sha256"]
    assert record.facts["calibration_set"] == {
        "source": "given:data",
        "sha256": record.record.calibration,
        "calls": {"full": 3},
    }
    again, _ = run_pass(residual, Step("quantize", record.record))
    assert graph_text(again.entries["full"]) == graph_text(after.entries["full"])
    dataset.data[1] = dataset.data[1] + 1e-3
    with pytest.raises(UserError, match="given:data is not the calibration set that was settled"):
        run_pass(residual, Step("quantize", record.record))


def test_the_seed_of_random_calls_counts(small):
    texts = {graph_text(quantised(small, seed=seed)[0].entries["full"]) for seed in (0, 0, 1)}
    assert len(texts) == 2


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.convolution(x))


def test_batch_norms_are_folded_first():
    program, _ = capture_module(Normed, x=torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"1 batch norms stand behind convolutions .*put reparameterize before it"):
        quantised(program)
    folded, _ = run_pass(program, Step("reparameterize", Reparameterize()))
    assert DEQUANTIZE in operators(quantised(folded)[0])


def test_half_precision_is_not_calibrated(small):
    half = capture_module(lambda: Small().half(), x=torch.zeros(3, 4, dtype=torch.float16))[0]
    with pytest.raises(UserError, match="it calibrates in float32, and one is not"):
        quantised(half)
    after, _ = quantised(half, scheme="w8", group_size=0)
    assert all(node.meta["val"].dtype == torch.float16 for node in after.entries["full"].calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w4", "form": "cpu"}, "'form' says nothing of scheme 'w4'"),
        ({"scheme": "w8", "data": "x"}, "'data' says nothing"),
        ({"group_size": 8}, "'group_size' says nothing of scheme 'int8'"),
        ({"scheme": "w4", "group_size": 1}, "a scale for every weight"),
        ({"scheme": "w8", "activations": 16}, "'activations' says nothing of scheme 'w8'"),
        ({"activations": 16, "search": "l2"}, "of activations: 16 there is nothing to choose"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


def test_patterns_that_match_nothing_are_refused(residual):
    with pytest.raises(UserError, match="'stam' matches nothing to quantise"):
        quantised(residual, keep="stam")


def test_structures_alone_take_weights_alone(small):
    absent = {name: Absent(name, value.shape, value.dtype) for name, value in small.weights.items()}
    structure = replace(small, weights=WeightStore(absent))
    assert quantised(structure, scheme="w8", group_size=2)[1].modified
    with pytest.raises(MissingValuesError):
        quantised(structure)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.full((2, 3, 16, 16), torch.nan)], "NaN or Inf"),
        ([torch.zeros(2, 3, 16, 15)], "of shape"),
        ([{"y": torch.zeros(2, 3, 16, 16)}], "has no 'x'"),
        ([], "has no item"),
    ],
)
def test_bad_data_is_refused(residual, dataset, data, message):
    dataset.data = data
    with pytest.raises(UserError, match=message):
        quantised(residual, data="given:data")


class Unseen(nn.Module):
    """A logarithm of negative numbers."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x):
        return self.one(torch.log(-x.abs() - 1))


def test_values_that_are_no_numbers_are_refused():
    program, _ = capture_module(Unseen, x=torch.zeros(2, 4))
    with pytest.raises(UserError, match="one reads NaN or Inf in calibration"):
        quantised(program)
