"""``reparameterize`` on real architectures: how many sites, what must be gone, and independent oracles for the rest."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from optpass.capture.sources import capture
from optpass.capture.timm_import import timm_importable
from optpass.evaluate.difference import program_difference, program_runner, tensor_difference
from optpass.ir.text import operator_name
from optpass.passes.reparameterize import Reparameterize
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

STEP = Step("reparameterize", Reparameterize())
RTOL = Reparameterize.contract.rtol
CONFIGS = Path(__file__).parents[1] / "configs"
with_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an optional extra")


def timm_model(name):
    with timm_importable():
        import timm
    return timm.create_model(name)


def reparameterized(program):
    after, record = run_pass(program, STEP)
    assert program_difference(program, after, trials=1).relative_error <= RTOL
    _, again = run_pass(after, STEP)
    assert not again.modified
    return after, record


def count(program, name):
    return sum(operator_name(node) == name for node in program.entries["full"].calls)


def captured(capture_module, name, size=224):
    return capture_module(lambda: timm_model(name), x=torch.zeros(1, 3, size, size))


@with_timm
@pytest.mark.parametrize(
    ("name", "sites", "parameters", "macs"),
    [
        # RepVGG, arXiv 2101.03697, table 4, and MobileOne, arXiv 2206.04040, table 9: the models for inference.
        ("repvgg_a0", 22, 8.31e6, 1.36e9),
        ("mobileone_s0", 43, 2.08e6, 275e6),
    ],
)
def test_as_published_and_as_timm_does_it(capture_module, name, sites, parameters, macs):
    program, module = captured(capture_module, name)
    after, record = run_pass(program, STEP)
    assert len(record.sites) == sites
    assert count(after, "batch_norm") == count(after, "add.Tensor") == 0
    assert count(after, "conv2d") == count(after, "relu") == sites
    totals = record.after.totals
    assert totals.parameters == pytest.approx(parameters, rel=0.001)
    assert totals.macs == pytest.approx(macs, rel=0.002)
    assert_as_timm(after, module, totals.parameters)


def assert_as_timm(after, module, parameters):
    """timm's own reparameterisation of the same module: its parameters, and its function."""
    from timm.utils.model import reparameterize_model

    theirs = reparameterize_model(module)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(x)
    [(_, found)] = program_runner(after, "full")({"x": x}).items()
    assert tensor_difference(expected, found).relative_error <= RTOL
    assert parameters <= sum(p.numel() for p in theirs.parameters())
    return theirs


@with_timm
def test_fastvit(capture_module):
    program, module = captured(capture_module, "fastvit_t8")
    after, record = reparameterized(program)
    assert len(record.sites) == 40
    assert count(after, "batch_norm") == count(after, "sub.Tensor") == 0
    assert_as_timm(after, module, record.after.totals.parameters)
    # Each block's 7×7 depthwise kernel reads what its 3×3 token mixer became.
    mixers = [item for item in record.declined if item.reason == "a 7×7 kernel over a 3×3 kernel is a larger kernel"]
    assert len(mixers) == 10


@with_timm
@pytest.mark.parametrize(
    ("name", "norms", "sites", "declined"),
    [
        # Two norms before a pointwise convolution go forward into it, and need no bias of their own.
        ("efficientnet_b0", 49, 47, 7),
        ("mobilenetv4_conv_small", 46, 42, 6),
        ("resnet18", 20, 20, 0),
    ],
)
def test_every_batch_norm_goes(capture_module, name, norms, sites, declined):
    program, _ = captured(capture_module, name, size=96)
    assert count(program, "batch_norm") == norms
    after, record = reparameterized(program)
    assert count(after, "batch_norm") == 0
    assert len(record.sites) == sites
    assert record.after.totals.macs == record.before.totals.macs
    assert record.after.totals.parameters < record.before.totals.parameters
    assert len(record.declined) == declined


@with_timm
def test_levit_norms_over_flattened_tokens(capture_module):
    """LeViT flattens batch and tokens for its BatchNorms: dense maps go through such reshapes."""
    program, module = captured(capture_module, "levit_128s")
    flattened = sum(type(layer).__name__ == "LinearNorm" for layer in module.modules())
    assert (flattened, count(program, "batch_norm")) == (46, 52)
    after, record = reparameterized(program)
    assert count(after, "batch_norm") == 0
    # Besides, four convolutions, and the two heads, each behind a norm, whose mean is one layer.
    assert len(record.sites) == flattened + 4 + 1
    assert count(after, "reshape") == count(program, "reshape") - 2 * flattened


@with_timm
def test_mobilenetv4_keeps_depthwise_and_pointwise_apart(capture_module):
    program, _ = captured(capture_module, "mobilenetv4_conv_small")
    _, record = reparameterized(program)
    [reason] = [item.reason for item in record.declined if item.path == "blocks.2.0.pw_exp.conv"]
    assert reason.startswith("one 5×5 convolution 64→192 on ")
    assert reason.endswith(" would take 240.8 MMAC, what it replaces takes 10.89 MMAC")


class LocalRelation(nn.Module):
    """UniFormerV2's local relation aggregator (dw_reduction 1.5) beside the identity."""

    def __init__(self, width=48, reduction=1.5):
        super().__init__()
        inner = int(width / reduction)
        self.norm = nn.BatchNorm3d(width)
        self.into = nn.Conv3d(width, inner, 1)
        self.temporal = nn.Conv3d(inner, inner, (3, 1, 1), padding=(1, 0, 0), groups=inner)
        self.out = nn.Conv3d(inner, width, 1)

    def forward(self, x):
        return torch.relu(x) + self.out(self.temporal(self.into(self.norm(torch.relu(x)))))


def test_uniformerv2(capture_module):
    program, _ = capture_module(LocalRelation, x=torch.zeros(1, 48, 4, 6, 6))
    after, record = reparameterized(program)
    assert record.sites == ("into",)
    assert count(after, "batch_norm") == 0
    assert count(after, "conv3d") == 3
    assert {item.path: item.reason for item in record.declined} == {
        "temporal": "the 3×1×1 kernel pads with zeros, where the constant that would be folded into it is added:"
        " the border would differ",
        "out": "one 3×1×1 convolution 32→48 on %conv3d_default would take 663.6 kMAC,"
        " what it replaces takes 235.0 kMAC",
    }


class MultiGroup(nn.Module):
    """FMViT's gMLP: pointwise convolutions in several group counts, each with its BatchNorm, and the identity's."""

    def __init__(self, width=24, groups=(2, 4, 8)):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1, groups=g, bias=False), nn.BatchNorm2d(width)) for g in groups
        )
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x):
        x = torch.relu(x)
        return torch.relu(sum(branch(x) for branch in self.branches) + self.identity(x))


def test_fmvit_groups(capture_module):
    program, _ = capture_module(MultiGroup, x=torch.zeros(2, 24, 5, 5))
    after, record = reparameterized(program)
    assert record.sites == ("(root)",)
    [convolution] = [node for node in after.entries["full"].calls if operator_name(node) == "conv2d"]
    assert convolution.args[6] == 2
    assert record.after.totals.macs == 2 * 25 * 24 * 12
    program, _ = capture_module(lambda: MultiGroup(groups=(3, 8)), x=torch.zeros(2, 24, 5, 5))
    _, record = reparameterized(program)
    assert record.after.totals.macs == record.before.totals.macs
    assert any("24→24 on %relu would take 28.80 kMAC" in item.reason for item in record.declined)


class LinearAdapter(nn.Module):
    """ZeroI2V's: x + s·(W₂(W₁x + b₁) + b₂)."""

    def __init__(self, width, scale=0.5):
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(width, width // 4), nn.Linear(width // 4, width), scale

    def forward(self, x):
        return x + self.scale * self.up(self.down(x))


def vision_model():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=3, **sizes))


def with_linear_adapters(width=48):
    """CLIP's vision tower with T_Adapter, S_Adapter and both MLP adapters in every layer."""
    model = vision_model()
    for layer in layers_of(model):
        layer.layer_norm1 = nn.Sequential(layer.layer_norm1, LinearAdapter(width))
        layer.self_attn.out_proj = nn.Sequential(layer.self_attn.out_proj, LinearAdapter(width))
        layer.layer_norm2 = nn.Sequential(layer.layer_norm2, LinearAdapter(width))
        layer.mlp.fc2 = nn.Sequential(layer.mlp.fc2, LinearAdapter(width))
    return model


def layers_of(model):
    return next(module.layers for module in model.modules() if hasattr(module, "layers"))


def test_zeroi2v_adapters_vanish_from_clip(capture_module):
    images = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    plain, _ = capture_module(vision_model, **images)
    _, of_plain = reparameterized(plain)
    program, _ = capture_module(with_linear_adapters, **images)
    after, record = reparameterized(program)
    # q, k, v, fc1 take the norm's scale and shift and the adapter before them; out_proj and fc2 the one behind.
    assert len(record.sites) == 3 * 6
    assert len(of_plain.sites) == 3 * 4
    assert record.after.totals.parameters == of_plain.after.totals.parameters
    assert record.after.totals.macs == of_plain.after.totals.macs == of_plain.before.totals.macs
    assert len(after.entries["full"].calls) == len(plain.entries["full"].calls)


class ShiftedAttention(nn.Module):
    """ZeroI2V's block over frames: T_Adapter, keys and values with heads shifted in time (STDHA), S_Adapter."""

    def __init__(self, width=16):
        super().__init__()
        self.before, self.behind = LinearAdapter(width), LinearAdapter(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def shifted(self, y):
        past, future, rest = y[..., :4], y[..., 4:8], y[..., 8:]
        past = torch.cat([past[:, :1], past[:, :-1]], 1)
        future = torch.cat([future[:, 1:], future[:, -1:]], 1)
        return torch.cat([past, future, rest], -1)

    def forward(self, x):
        y = self.before(torch.relu(x))
        q, k, v = (
            z.unflatten(-1, (4, 4)).transpose(-2, -3) for z in (self.q(y), *map(self.shifted, (self.k(y), self.v(y))))
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.behind(self.out(z.transpose(-2, -3).flatten(-2)))


def test_zeroi2v_shift_in_time_stays(capture_module):
    program, _ = capture_module(ShiftedAttention, x=torch.zeros(2, 3, 5, 16))
    after, record = reparameterized(program)
    assert record.sites == ("q", "k", "v", "behind")
    assert count(after, "linear") == 4
    assert count(after, "cat") == count(program, "cat") == 6


class AdaptMLP(nn.Module):
    """AdaptFormer's block: x + MLP(norm x) + s·Up(ReLU(Down(x)))."""

    def __init__(self, width=24, scale=0.1):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)
        self.down, self.up, self.scale = nn.Linear(width, 8), nn.Linear(8, width), scale

    def forward(self, x):
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x)))) + self.scale * self.up(torch.relu(self.down(x)))


def test_adaptformer_folds_its_scale_and_stays(capture_module):
    program, module = capture_module(AdaptMLP, x=torch.zeros(2, 5, 24))
    after, record = reparameterized(program)
    assert record.sites == ("fc1", "(root)")
    assert count(after, "mul.Tensor") == 0
    assert count(after, "relu") == 1
    torch.testing.assert_close(after.weights["up.weight"].evaluate(), 0.1 * module.up.weight)
    torch.testing.assert_close(after.weights["up.bias"].evaluate(), 0.1 * module.up.bias)


class FouRA(nn.Module):
    """W₀x + F⁻¹B(α·gate∘AFx) with the orthonormal DCT F, and a gate that is frozen or computed from AFx."""

    def __init__(self, frozen, width=32, rank=6, alpha=0.8):
        super().__init__()
        self.base, self.a, self.b = (
            nn.Linear(width, width),
            nn.Linear(width, rank, False),
            nn.Linear(rank, width, False),
        )
        n, k = torch.arange(width) + 0.5, torch.arange(width)[:, None]
        self.register_buffer("dct", torch.cos(math.pi * n * k / width) * math.sqrt(2 / width))
        self.register_buffer("mask", torch.arange(rank) % 3 > 0)
        self.gate = None if frozen else nn.Linear(rank, rank)
        self.alpha = alpha

    def forward(self, x):
        low = self.a(x @ self.dct.t())
        gate = self.mask if self.gate is None else torch.sigmoid(self.gate(low))
        return torch.relu(self.base(x) + self.b(self.alpha * (low * gate)) @ self.dct)


def test_foura_with_a_frozen_gate_goes_into_the_layer(capture_module):
    program, module = capture_module(lambda: FouRA(frozen=True), x=torch.zeros(2, 5, 32))
    after, record = reparameterized(program)
    assert record.sites == ("(root)",)
    assert set(after.weights) == {"base.weight", "base.bias"}
    low_rank = module.b.weight @ torch.diag(module.mask.float()) @ module.a.weight
    expected = module.base.weight + module.alpha * module.dct.T @ low_rank @ module.dct
    torch.testing.assert_close(after.weights["base.weight"].evaluate(), expected, rtol=1e-4, atol=1e-5)


def test_foura_with_a_dynamic_gate_costs_what_lora_costs(capture_module):
    program, _ = capture_module(lambda: FouRA(frozen=False), x=torch.zeros(2, 5, 32))
    after, record = reparameterized(program)
    # A∘F, and F⁻¹∘B∘α.
    assert len(record.sites) == 2
    assert count(after, "matmul") == 0
    assert record.after.totals.macs == 10 * (32 * 32 + 2 * 32 * 6 + 6 * 6)
    reason = "the factor %sigmoid depends on the input: what is linear before and after stays apart"
    assert reason in [item.reason for item in record.declined]


def test_sd15_unet():
    """The GroupNorm in front of every transformer goes into proj_in, the LayerNorms into to_q of attn2 and the MLP."""
    program = capture(CONFIGS / "sd15-unet", inputs={"sample": (1, 4, 64, 64)})
    after, record = run_pass(program, STEP)
    sites = list(record.sites)
    assert sum(site.endswith(".proj_in") for site in sites) == 16
    assert sum(site.endswith(".attn2.to_q") for site in sites) == 16
    assert sum(site.endswith(".ff.net.0.proj") for site in sites) == 16
    assert record.after.totals.macs == record.before.totals.macs
    assert not any(".attentions." in name and ".norm." in name for name in after.weights)
    # Three layers without bias would each need one: more than the norm's scale and shift.
    assert sum(".attn1.to_" in item.path and "would hold" in item.reason for item in record.declined) == 48


def test_a_small_unet_computes_the_same(capture_module):
    from diffusers import UNet2DConditionModel

    def build():
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(9.0)}
    program, _ = capture_module(build, **inputs, encoder_hidden_states=torch.randn(1, 7, 32))
    _, record = reparameterized(program)
    assert sum(site.endswith(".proj_in") for site in record.sites) == 4
