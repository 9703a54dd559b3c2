from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from optpass.analysis.cost import measure
from optpass.errors import UserError
from optpass.evaluate.difference import outputs_difference, program_runner, tensor_difference
from optpass.ir.text import graph_text, program_text
from optpass.ir.weights import Cast
from optpass.passes.cast import CastFloats
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step


def cast(program, **options):
    return run_pass(program, Step("cast", CastFloats(**options)))


class Embedded(nn.Module):
    """A sinusoid of the time, added to a convolution: what every denoiser starts with."""

    def __init__(self):
        super().__init__()
        self.conv, self.time = nn.Conv1d(2, 4, 1), nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.01]), persistent=False)

    def forward(self, x, time):
        angles = time[:, None].float() * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], -1)
        return self.conv(x) * self.time(embedding)[:, :, None]


def embedded(capture_module):
    return capture_module(Embedded, x=torch.randn(1, 2, 3), time=torch.tensor([7]))


def test_golden_keeps_the_boundary_and_the_time(capture_module):
    program, _ = embedded(capture_module)
    after, record = cast(program, dtype="bfloat16")
    assert program_text(after) == (
        "full(x: f32[1, 2, 3], time: i64[1]):\n"
        "  %unsqueeze = unsqueeze(%time, 1) : i64[1, 1]  ; (root)\n"
        "  %to = to.dtype(%unsqueeze, f32) : f32[1, 1]  ; (root)\n"
        "  %mul = mul.Tensor(%to, @frequencies) : f32[1, 2]  ; (root)\n"
        "  %sin = sin(%mul) : f32[1, 2]  ; (root)\n"
        "  %cos = cos(%mul) : f32[1, 2]  ; (root)\n"
        "  %cat = cat([%sin, %cos], -1) : f32[1, 4]  ; (root)\n"
        "  %to_dtype = to.dtype(%x, bf16) : bf16[1, 2, 3]  ; conv\n"
        "  %conv1d = conv1d(%to_dtype, @conv.weight, @conv.bias) : bf16[1, 4, 3]  ; conv\n"
        "  %to_dtype_1 = to.dtype(%cat, bf16) : bf16[1, 4]  ; time\n"
        "  %linear = linear(%to_dtype_1, @time.weight, @time.bias) : bf16[1, 4]  ; time\n"
        "  %unsqueeze_1 = unsqueeze(%linear, 2) : bf16[1, 4, 1]  ; (root)\n"
        "  %mul_1 = mul.Tensor(%conv1d, %unsqueeze_1) : bf16[1, 4, 3]  ; (root)\n"
        "  %to_dtype_2 = to.dtype(%mul_1, f32) : f32[1, 4, 3]  ; (root)\n"
        "  return output=%to_dtype_2\n"
        "\n"
        "weights:\n" + "".join(
            f"  @{name} = {after.weights[name]} : {kind}\n"
            for name, kind in [
                ("conv.weight", "bf16[4, 2, 1]"),
                ("conv.bias", "bf16[4]"),
                ("time.weight", "bf16[4, 4]"),
                ("time.bias", "bf16[4]"),
                ("frequencies", "f32[2]"),
            ]
        )
    )  # fmt: skip
    assert all(isinstance(after.weights[name], Cast) for name in record.sites)
    assert set(record.sites) == {"conv.weight", "conv.bias", "time.weight", "time.bias"}


def test_boundary_can_be_cast_too(capture_module):
    program, _ = embedded(capture_module)
    after, _ = cast(program, dtype="float16", boundary="cast")
    text = graph_text(after.entries["full"])
    assert text.startswith("graph(x: f16[1, 2, 3], time: i64[1]):")
    assert "conv1d(%x, " in text
    assert text.count("to.dtype") == 2
    assert str(after.entries["full"].outputs[0]) == "output: f16[1, 4, 3]"


@pytest.mark.parametrize("options", [{}, {"boundary": "cast"}, {"keep": ("time",)}])
def test_twice_is_once(capture_module, options):
    program, _ = embedded(capture_module)
    after, _ = cast(program, dtype="float16", **options)
    again, record = cast(after, dtype="float16", **options)
    assert not record.modified
    assert program_text(again) == program_text(after)


def test_keep_leaves_modules_as_they_are(capture_module):
    program, _ = embedded(capture_module)
    after, record = cast(program, dtype="float16", keep=("time",))
    text = graph_text(after.entries["full"])
    assert set(record.sites) == {"conv.weight", "conv.bias"}
    assert "%linear = linear(%cat, @time.weight, @time.bias) : f32[1, 4]" in text
    assert "%to_dtype_1 = to.dtype(%linear, f16) : f16[1, 4]" in text
    assert "mul.Tensor(%conv1d, %unsqueeze_1) : f16[1, 4, 3]" in text
    wide, _ = cast(after, dtype="float16")
    assert "@time.bias) : f16[1, 4]" in graph_text(wide.entries["full"])


def test_keep_that_matches_nothing_is_refused(capture_module):
    program, _ = embedded(capture_module)
    with pytest.raises(UserError, match="'tiem' matches no module"):
        cast(program, dtype="float16", keep=("tiem",))


class Island(nn.Module):
    """float16 weights with a float32 softmax in the middle, and a mask of float32's lowest number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4).half(), nn.Linear(4, 4).half()

    def forward(self, x):
        y = self.a(x).float().masked_fill(torch.tensor([True, False, False, False]), -3.4e38)
        return self.b(y.softmax(-1).half())


def test_islands_and_literals(capture_module):
    program, module = capture_module(Island, x=torch.randn(2, 4, dtype=torch.float16))
    brain, _ = cast(program, dtype="bfloat16")
    text = graph_text(brain.entries["full"])
    assert "softmax.int(%masked_fill, -1) : f32[2, 4]" in text
    assert "linear(%to_1, @b.weight, @b.bias) : bf16[2, 4]" in text
    wide, _ = cast(program, dtype="float32")
    assert [str(node.target) for node in wide.entries["full"].calls if "to.dtype" in str(node.target)] == [
        "aten.to.dtype"
    ] * 2
    x = torch.randn(2, 4).half()
    with torch.no_grad():
        expected = module(x)
    assert tensor_difference(expected, program_runner(wide, "full")({"x": x})["output"]).relative_error < 2e-3


def test_finite_literals_stay_finite(capture_module):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return y.masked_fill(y > 0, torch.finfo(torch.float32).min)

    program, _ = capture_module(Masked, x=torch.randn(2, 4))
    after, _ = cast(program, dtype="float16")
    result = program_runner(after, "full")({"x": torch.randn(8, 4)[:2]})["output"]
    assert torch.isfinite(result).all()
    assert result.min() == -65504


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 4e-3), ("bfloat16", 4e-2)])
def test_a_small_svd_within_a_measured_bound(tiny_svd, dtype, bound):
    program, module, inputs = tiny_svd
    after, record = cast(program, dtype=dtype)
    totals = measure(after).totals
    assert totals.weight_bytes == measure(program).totals.weight_bytes / 2
    assert totals.macs == record.before.totals.macs
    low = getattr(torch, dtype)
    with torch.no_grad():
        reference = {"sample": module(**inputs).sample}
        eager_inputs = {name: value if name == "timestep" else value.to(low) for name, value in inputs.items()}
        eager = {"sample": copy.deepcopy(module).to(low)(**eager_inputs).sample.float()}
    ours = program_runner(after, "full")(inputs)
    assert ours["sample"].dtype == torch.float32
    error = outputs_difference(reference, ours)
    assert 0 < error.relative_error < bound
    # As close to float32 as diffusers' own model in this dtype.
    assert error.snr > outputs_difference(reference, eager).snr - 3
