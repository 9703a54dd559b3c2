from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import denoiser
from torch import Tensor, nn

from optpass.analysis.cost import measure
from optpass.analysis.generation import generation_cost
from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.difference import program_runner
from optpass.evaluate.trials import random_inputs
from optpass.evaluate.walks import walk
from optpass.ir.loop import Cycle, Listed, State, past, present, single_step
from optpass.ir.program import InputRange
from optpass.ir.text import graph_text
from optpass.passes.cache_features import CacheFeatures
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step, make_recipe
from optpass.rewrite.splitting import subgraph
from optpass.runtime.looped import program_module
from optpass.testing import capture_module

CONFIGS = Path(__file__).parents[1] / "configs"
BEFORE, AFTER = {"cut": "up_blocks.2.upsamplers.0", "at": "input"}, {"cut": "up_blocks.2"}
"""The published cuts of Stable Diffusion 1.5's UNet."""


def cached(program, **options):
    return run_pass(program, Step("cache-features", CacheFeatures(**options)))


@pytest.fixture(name="unet", scope="session")
def _unet():
    """A two-level UNet2DConditionModel over latents of 8×8: Program and module."""
    from diffusers import UNet2DConditionModel

    def build():
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    inputs = {
        "sample": torch.zeros(2, 4, 8, 8),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.zeros(2, 5, 16),
    }
    program, module = capture_module(build, **inputs)
    loop = single_step("full", program.entries["full"].signature)
    return replace(program, loop=loop, ranges={"timestep": InputRange(0, 1000, "uniform")}), module


def test_golden():
    program, _ = denoiser()
    after, record = cached(program, cut="inner")
    assert graph_text(after.entries["full"], "full") == (
        "full(sample: f32[2, 4], timestep: f32[], context: f32[2, 3]):\n"
        "  %linear = linear(%sample, @enter.weight, @enter.bias) : f32[2, 4]  ; enter\n"
        "  %div = div.Tensor(%timestep, 1000) : f32[]  ; (root)\n"
        "  %add = add.Tensor(%linear, %div) : f32[2, 4]  ; (root)\n"
        "  %linear_1 = linear(%add, @inner.weight, @inner.bias) : f32[2, 4]  ; inner\n"
        "  %linear_2 = linear(%context, @mix.weight, @mix.bias) : f32[2, 4]  ; mix\n"
        "  %add_1 = add.Tensor(%linear_1, %linear_2) : f32[2, 4]  ; (root)\n"
        "  %tanh = tanh(%add_1) : f32[2, 4]  ; (root)\n"
        "  %add_2 = add.Tensor(%tanh, %add) : f32[2, 4]  ; (root)\n"
        "  %linear_3 = linear(%add_2, @leave.weight, @leave.bias) : f32[2, 4]  ; leave\n"
        "  return output=%linear_3, present.feature=%linear_1"
    )
    assert graph_text(after.entries["reuse"], "reuse") == (
        "reuse(sample: f32[2, 4], timestep: f32[], context: f32[2, 3], past.feature: f32[2, 4]):\n"
        "  %linear = linear(%sample, @enter.weight, @enter.bias) : f32[2, 4]  ; enter\n"
        "  %div = div.Tensor(%timestep, 1000) : f32[]  ; (root)\n"
        "  %add = add.Tensor(%linear, %div) : f32[2, 4]  ; (root)\n"
        "  %linear_2 = linear(%context, @mix.weight, @mix.bias) : f32[2, 4]  ; mix\n"
        "  %add_1 = add.Tensor(%past_feature, %linear_2) : f32[2, 4]  ; (root)\n"
        "  %tanh = tanh(%add_1) : f32[2, 4]  ; (root)\n"
        "  %add_2 = add.Tensor(%tanh, %add) : f32[2, 4]  ; (root)\n"
        "  %linear_3 = linear(%add_2, @leave.weight, @leave.bias) : f32[2, 4]  ; leave\n"
        "  return output=%linear_3"
    )
    assert after.loop == replace(
        program.loop,
        variants={"full": ("full",), "reuse": ("reuse",)},
        schedule=Cycle(("full", "reuse")),
        states={"feature": State("feature", (2, 4), torch.float32)},
    )
    assert record.sites == ("inner",)
    assert not record.declined


CUTS = [
    {"cut": "up_blocks.0"},
    {"cut": "up_blocks.0.upsamplers.0", "at": "input"},
    {"cut": "up_blocks.1.attentions.0"},
    {"cut": "mid_block"},
    {"cut": "down_blocks.0"},
    {"cut": "up_blocks.0", "at": "input"},
]


@pytest.mark.parametrize("options", CUTS, ids=lambda options: "-".join(options.values()))
def test_reusing_what_the_same_step_kept_is_the_full_step(unet, options):
    program, _ = unet
    after, _ = cached(program, **options)
    given = random_inputs(program.entries["full"].inputs_at(), program.ranges, 3)
    original = program_runner(program, "full")(given)["sample"]
    made = program_runner(after, "full")(given)
    kept = {past(name): made[present(name)] for name in after.loop.states}
    reuse = program_runner(after, "reuse")({**given, **kept})
    assert torch.equal(made["sample"], original)
    assert torch.equal(reuse["sample"], original)
    assert measure(after).entries["reuse"].totals.macs < measure(program).totals.macs
    # Fed with something else, it answers something else.
    other = program_runner(after, "reuse")({**given, **{name: value + 1 for name, value in kept.items()}})
    assert not torch.equal(other["sample"], original)


def hooked(module: nn.Module, cut: str, at: str, computes: Callable[[int], bool]) -> Callable[..., Tensor]:
    """The oracle: diffusers' module, with a hook at the cut that puts back what passed it in the last computed step."""
    step, kept = -1, None

    def exchange(value):
        nonlocal kept
        kept = value if computes(step) else kept
        return kept

    place = module.get_submodule(cut)
    if at == "output":
        handle = place.register_forward_hook(lambda _, __, output: exchange(output))
    else:
        handle = place.register_forward_pre_hook(lambda _, args: (exchange(args[0]), *args[1:]))

    def call(**inputs: Tensor) -> Tensor:
        nonlocal step
        step += 1
        with torch.no_grad():
            return module(**inputs).sample

    call.remove = handle.remove
    return call


@pytest.mark.parametrize(
    ("options", "computes"),
    [
        ({"cut": "up_blocks.0", "every": 3}, lambda step: step % 3 == 0),
        ({"cut": "up_blocks.0.upsamplers.0", "at": "input"}, lambda step: step % 2 == 0),
        ({"cut": "up_blocks.1.attentions.0", "steps": (0, 1, 4), "of": 7}, lambda step: step in (0, 1, 4)),
        ({"cut": "mid_block", "every": 7}, lambda step: step == 0),
    ],
)
def test_a_generation_is_that_of_an_eager_hook(unet, options, computes):
    program, module = unet
    after, _ = cached(program, **options)
    found, oracle = program_module(after), hooked(module, options["cut"], options.get("at", "output"), computes)
    calls = walk(after.loop, program.entries["full"].inputs_at(), program.ranges, 5, 7)
    for inputs in calls:
        expected = oracle(**inputs)
        torch.testing.assert_close(found(**inputs).sample, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    oracle.remove()
    computed = sum(map(computes, range(7)))
    assert found.statistics == {"full": computed, "reuse": 7 - computed}


def test_guidance_in_two_calls_a_step(unet):
    """Each of the two has a feature of its own, whichever comes first."""
    program, module = unet
    found = program_module(cached(program, cut="up_blocks.0", every=2)[0])
    calls = walk(program.loop, program.entries["full"].inputs_at(), program.ranges, 5, 6)
    other = torch.randn(2, 5, 16)
    with_class = [inputs | {"encoder_hidden_states": other} for inputs in calls]
    expected = []
    for each in (calls, with_class):
        oracle = hooked(module, "up_blocks.0", "output", lambda step: step % 2 == 0)
        expected.append([oracle(**inputs) for inputs in each])
        oracle.remove()
    for step in range(6):
        for each, answers in zip((calls, with_class), expected, strict=True):
            torch.testing.assert_close(found(**each[step]).sample, answers[step], atol=1e-4, rtol=1e-4)


def test_every_step_computed_is_no_caching(unet):
    program, _ = unet
    unchanged, record = cached(program, cut="up_blocks.0", every=1)
    assert not record.modified
    assert [item.reason for item in record.declined] == ["every step is full, so none would reuse"]
    assert unchanged.loop == program.loop
    listed, _ = cached(program, cut="up_blocks.0", steps=tuple(range(5)), of=6)
    plain, found = program_module(program), program_module(listed)
    for inputs in walk(program.loop, program.entries["full"].inputs_at(), program.ranges, 1, 5):
        assert torch.equal(found(**inputs).sample, plain(**inputs).sample)


def test_deepcache_skips_what_lies_behind_its_cut(unet):
    """Branch 0 of its package: all of the highest level but the last layer of the up block, and all below."""
    deepcache = pytest.importorskip("DeepCache")
    program, module = unet

    class Pipeline:
        unet = module
        scheduler = type("Scheduler", (), {"timesteps": torch.zeros(0)})

    after, _ = cached(program, cut="up_blocks.1.attentions.0", every=2)
    calls = walk(after.loop, program.entries["full"].inputs_at(), program.ranges, 5, 5)
    Pipeline.scheduler.timesteps = torch.stack([inputs["timestep"] for inputs in calls])
    helper = deepcache.DeepCacheSDHelper(pipe=Pipeline)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    found = program_module(after)
    for inputs in calls:
        with torch.no_grad():
            expected = module(*inputs.values()).sample
        torch.testing.assert_close(found(**inputs).sample, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    helper.disable()


def test_other_states_and_entries_stay():
    """A Program some of whose work runs once a generation already."""
    program, _ = denoiser()
    graph = program.entries["full"]
    mixed = next(node for node in graph.calls if node.meta["path"] == "mix")
    (result,) = graph.output_node.args[0]
    prepare = subgraph(graph, inputs={}, outputs={present("mixed"): mixed})
    step = subgraph(graph, inputs={past("mixed"): mixed}, outputs={"output": result})
    loop = replace(program.loop, once=("prepare",), states={"mixed": State("mixed", (2, 4), torch.float32)})
    hoisted = replace(program, entries={"full": step, "prepare": prepare}, loop=loop)
    after, _ = cached(hoisted, cut="inner")
    assert set(after.loop.states) == {"mixed", "feature"}
    assert after.loop.once == ("prepare",)
    assert after.entries["reuse"].signature.inputs == ("sample", "timestep", "past.mixed", "past.feature")
    direct = program_module(cached(program, cut="inner")[0])
    found = program_module(after)
    for inputs in walk(program.loop, graph.inputs_at(), program.ranges, 2, 5):
        assert torch.equal(found(**inputs), direct(**inputs))


def test_a_loop_that_caches_is_left_alone(unet):
    program, _ = unet
    after, _ = cached(program, cut="up_blocks.0")
    again, record = cached(after, cut="up_blocks.0")
    assert not record.modified
    assert [item.reason for item in record.declined] == ["the loop reuses already: its steps are full, reuse"]
    assert again.loop == after.loop


class Pointwise(nn.Module):
    """A linear layer beside a module that only multiplies."""

    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(4, 4), nn.Softplus()

    def forward(self, sample, timestep):
        return self.linear(sample) + self.gate(sample) * timestep


def test_refusals(unet):
    program, _ = unet

    def refused(program, **options):
        with pytest.raises(UserError) as error:
            cached(program, **options)
        return str(error.value).removeprefix("pass 'cache-features' cannot run: ")

    assert refused(program, cut="up_block.0") == "no module 'up_block.0' in the graph; did you mean 'up_blocks.0'?"
    assert refused(program, cut="time_embedding") == "what leaves time_embedding does not depend on sample"
    assert refused(program, cut="conv_out") == "a step that reuses what leaves conv_out would not see sample"
    assert refused(program, cut="conv_norm_out", at="input").endswith("enters conv_norm_out would not see sample")
    # The last up block reads every fresh value that there is.
    assert refused(program, cut="up_blocks.1", at="input").endswith("enters up_blocks.1 would not see sample")
    small, _ = capture_module(Pointwise, sample=torch.zeros(2, 4), timestep=torch.tensor(1.0))
    assert refused(small, cut="gate").startswith("the model has no loop")
    looped = replace(small, loop=single_step("full", small.entries["full"].signature))
    assert refused(looped, cut="gate") == "a step that reuses what leaves gate would save no product"


def test_options_that_do_not_go_together():
    def refused(options):
        with pytest.raises(UserError) as error:
            make_recipe({"passes": [{"cache-features": {"cut": "up_blocks.0", **options}}]})
        return str(error.value)

    assert "two schedules" in refused({"every": 2, "steps": [0, 2], "of": 4})
    assert "belong together" in refused({"steps": [0, 2]})
    for steps in ([], [1, 2], [2, 0], [0, 4]):
        assert "0 and later steps below of, in order" in refused({"steps": steps, "of": 4})
    assert "width is that of the resnet adaptor" in refused({"width": 64})
    assert "healing" not in refused({"every": 0})


class Adaptor(nn.Module):
    """Clockwork's adaptor, written with PyTorch's layers."""

    def __init__(self, fresh: int, feature: int, time: int, context: int, width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(fresh + feature, width, 3, 2, 1)
        self.text_proj = nn.Linear(context, width)
        self.resnets = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.resnets:
            block.norm1, block.norm2 = nn.GroupNorm(32, width), nn.GroupNorm(32, width)
            block.conv1, block.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
            block.time_emb_proj = nn.Linear(time, width)
        self.conv_out = nn.ConvTranspose2d(width, feature, 4, 2, 1)

    def forward(self, fresh, feature, time, context):
        silu = nn.functional.silu
        hidden = self.conv_in(torch.cat([fresh, feature], 1)) + self.text_proj(context.mean(1))[..., None, None]
        for block in self.resnets:
            residual = block.conv1(silu(block.norm1(hidden))) + block.time_emb_proj(silu(time))[..., None, None]
            hidden = hidden + block.conv2(silu(block.norm2(residual)))
        return feature + self.conv_out(hidden)


def outputs_of(module, paths, given):
    """What the modules at ``paths`` return in one call."""
    found = {}
    handles = [
        module.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: found.update({path: output}))
        for path in paths
    ]
    with torch.no_grad():
        module(given["sample"], given["timestep"], given["encoder_hidden_states"])
    for handle in handles:
        handle.remove()
    return [found[path][0] if isinstance(found[path], tuple) else found[path] for path in paths]


ADAPTED = [
    ({"cut": "up_blocks.0.upsamplers.0", "at": "input"}, "down_blocks.0.downsamplers.0"),
    ({"cut": "up_blocks.0"}, "down_blocks.0.attentions.0"),
]


@pytest.mark.parametrize(("options", "fresh"), ADAPTED)
def test_the_resnet_adaptor(unet, options, fresh, randomised):
    program, module = unet
    identity, _ = cached(program, **options)
    after, record = cached(program, **options, adaptor="resnet", width=32)
    assert after.untrained == set(after.weights) - set(program.weights) != set()
    assert record.record.promise.kind == "retrain"
    given = random_inputs(after.entries["reuse"].inputs_at(), program.ranges, 3)
    given["past.feature"] = torch.randn(given["past.feature"].shape)
    plain = program_runner(identity, "reuse")(given)["sample"]
    # The last convolution is zero at first.
    assert torch.equal(program_runner(after, "reuse")(given)["sample"], plain)

    values = outputs_of(module, (fresh, "time_embedding"), given)
    feature = given["past.feature"]
    oracle = randomised(Adaptor(values[0].shape[1], feature.shape[1], values[1].shape[1], 16, 32))
    weights = {f"adaptor.{name}": value for name, value in oracle.state_dict().items()}
    assert set(weights) == {name for name in after.weights if name.startswith("adaptor.")}
    with torch.no_grad():
        adapted = oracle(values[0], feature, values[1], given["encoder_hidden_states"])
    expected = program_runner(identity, "reuse")({**given, "past.feature": adapted})["sample"]
    graph = after.entries["reuse"]
    (found,) = graph.module(after.weights, values=weights)(*(given[spec.name] for spec in graph.inputs))
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_what_the_resnet_adaptor_does_not_take(unet):
    program, _ = unet
    for options, reason in (
        ({"cut": "down_blocks.0"}, "takes one value, and 2 cross the cut"),
        ({"cut": "up_blocks.1.attentions.0.transformer_blocks.0"}, r"takes images \[N, C, H, W\]"),
    ):
        with pytest.raises(UserError, match=reason):
            cached(program, **options, adaptor="resnet")
    with pytest.raises(UserError, match=r"takes images"):
        cached(denoiser()[0], cut="inner", adaptor="resnet")


@pytest.fixture(name="sd15", scope="module")
def _sd15():
    return capture(CONFIGS / "sd15-unet", inputs={"sample": (1, 4, 64, 64)})


@pytest.fixture(name="efficient", scope="module")
def _efficient(tmp_path_factory):
    """Stable Diffusion 1.5's UNet without the transformers of its first level."""
    config = json.loads((CONFIGS / "sd15-unet" / "config.json").read_text())
    config["down_block_types"] = ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"]
    config["up_block_types"] = ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]
    folder = tmp_path_factory.mktemp("efficient")
    (folder / "config.json").write_text(json.dumps(config))
    return capture(folder, inputs={"sample": (1, 4, 64, 64)})


def gigaflops(program, entry="full"):
    """2·MAC without the products inside attention, as Clockwork's paper counts."""
    return measure(program).entries[entry].totals.flops(attention=False) / 1e9


@pytest.mark.parametrize(("cut", "reuse", "saved"), [(BEFORE, 228.1, 0.33), (AFTER, 197.9, 0.354)])
def test_stable_diffusion_as_published(sd15, cut, reuse, saved):
    after, _ = cached(sd15, **cut, every=2)
    assert gigaflops(after) == pytest.approx(677.2, rel=0.01)
    # The identity does not read the first level's downsampler, 1.9 GFLOP that the published figures have.
    assert gigaflops(after, "reuse") == pytest.approx(reuse - 1.89, rel=0.001)
    assert gigaflops(after, "reuse") == pytest.approx(reuse, rel=0.01)
    before, cost = (generation_cost(program, 8).flops(attention=False) for program in (sd15, after))
    assert 0.32 <= 1 - cost / before <= 0.36
    assert 1 - cost / before == pytest.approx(saved, abs=0.005)


def test_the_efficient_unet_as_published(efficient):
    after, _ = cached(efficient, **BEFORE)
    assert gigaflops(after) == pytest.approx(593.0, rel=0.01)
    assert gigaflops(after, "reuse") == pytest.approx(143.9 - 1.89, rel=0.001)
    before, cost = (generation_cost(program, 8).flops(attention=False) for program in (efficient, after))
    assert 1 - cost / before == pytest.approx(0.38, abs=0.005)


def test_the_adaptor_as_published(sd15):
    """Of the 14 M parameters and 7 GFLOP of Clockwork's ResNet adaptor."""
    identity, _ = cached(sd15, **BEFORE)
    after, _ = cached(sd15, **BEFORE, adaptor="resnet")
    parameters = sum(value.numel for name, value in after.weights.items() if name.startswith("adaptor."))
    assert parameters / 1e6 == pytest.approx(13.9, rel=0.01)
    # It reads the downsampler's output, and so the published figure of the step before the adaptor is whole again.
    added = gigaflops(after, "reuse") - gigaflops(identity, "reuse") - 1.89
    assert added == pytest.approx(6.4, rel=0.01)


def test_a_listed_schedule_is_told(unet):
    after, _ = cached(unet[0], cut="up_blocks.0", steps=[0, 2, 3], of=5)
    assert after.loop.schedule == Listed((0, 2, 3), 5)
    with pytest.raises(ValueError, match="0 and later steps below of, in order"):
        cached(unet[0], cut="up_blocks.0", steps=[1, 2], of=5)
