from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from block_oracles import Extrapolated, Kept, range_cache
from denoisers import denoiser, sampled
from torch import Tensor, nn
from torch.nn import functional

from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import program_runners
from optpass.evaluate.trials import random_inputs
from optpass.evaluate.walks import compared_calls
from optpass.ir.interface import call_interface
from optpass.ir.loop import Adaptive, Cycle, single_step
from optpass.ir.program import InputRange, Origin, Program
from optpass.ir.text import graph_text, loop_text
from optpass.ir.weights import Absent, WeightStore
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.hoist_invariants import HoistInvariants
from optpass.pipeline.manager import PassRecord, run_pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.target import Lowering
from optpass.runtime.looped import engine_module, program_module
from optpass.targets.onnxruntime import OnnxRuntime

SMALL = 1e-6
"""max|a−b| / max|a| of what rounds: h + (h' − h) is not h' to the bit."""


def cache(program: Program, **options: Any) -> tuple[Program, PassRecord]:
    return run_pass(program, Step("cache-blocks", CacheBlocks.from_options(options, owner="cache-blocks")))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Small(nn.Module):
    def __init__(self, layers: int = 3, enter: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.enter, self.layers = enter(), nn.ModuleList(Layer() for _ in range(layers))
        self.leave = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(sample) * timestep.cos()
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def small(capture_module: Any, build: Callable[[], nn.Module] = Small) -> Program:
    program, _ = capture_module(build, sample=torch.zeros(2, 5, 4), timestep=torch.tensor(1.0))
    loop = single_step("full", program.entries["full"].signature)
    return replace(program, loop=loop, ranges={"timestep": InputRange(0, 1000, "uniform")})


def test_golden(capture_module):
    after, record = cache(small(capture_module))
    body = "\n".join(
        f"  %layer_norm{i} = layer_norm(%{x}, [4], @layers.{n}.norm.weight, @layers.{n}.norm.bias, 1e-05, False)"
        f" : f32[2, 5, 4]  ; layers.{n}.norm\n"
        f"  %linear{j} = linear(%layer_norm{i}, @layers.{n}.up.weight, @layers.{n}.up.bias)"
        f" : f32[2, 5, 8]  ; layers.{n}.up\n"
        f"  %relu{i} = relu(%linear{j}) : f32[2, 5, 8]  ; layers.{n}\n"
        f"  %linear{k} = linear(%relu{i}, @layers.{n}.down.weight, @layers.{n}.down.bias)"
        f" : f32[2, 5, 4]  ; layers.{n}.down\n"
        f"  %add{i} = add.Tensor(%{x}, %linear{k}) : f32[2, 5, 4]  ; layers.{n}"
        for n, i, j, k, x in ((0, "", "", "_1", "mul"), (1, "_1", "_2", "_3", "add"), (2, "_2", "_4", "_5", "add_1"))
    )
    first = body.split("\n  %layer_norm_1")[0]
    begin = "  %cos = cos(%timestep) : f32[]  ; (root)\n  %mul = mul.Tensor(%sample, %cos) : f32[2, 5, 4]  ; (root)\n"
    end = "  %linear_6 = linear(%{}, @leave.weight, @leave.bias) : f32[2, 5, 4]  ; leave\n  return output=%linear_6"
    assert graph_text(after.entries["full"]) == (
        f"graph(sample: f32[2, 5, 4], timestep: f32[]):\n{begin}{body}\n"
        f"  %sub_tensor = sub.Tensor(%add_2, %add) : f32[2, 5, 4]  ; layers.2\n"
        f"{end.format('add_2')}, present.layers.2=%sub_tensor"
    )
    assert graph_text(after.entries["reuse"]) == (
        f"graph(sample: f32[2, 5, 4], timestep: f32[], past.layers.2: f32[2, 5, 4]):\n{begin}{first}\n"
        f"  %add_tensor = add.Tensor(%add, %past_layers_2) : f32[2, 5, 4]  ; layers.2\n"
        f"{end.format('add_tensor')}"
    )
    assert after.loop is not None
    assert loop_text(after.loop) == (
        "loop every=2:\n  full: full\n  reuse: reuse\n  state layers.2: f32[2, 5, 4] (written)"
    )
    assert record.sites == ("layers.1", "layers.2")


def declined(program: Program, **options: Any) -> str:
    after, record = cache(program, **options)
    assert not record.modified
    assert after.loop == program.loop
    [item] = record.declined
    return item.reason


class PostNorm(Small):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * timestep
        for layer in self.layers:
            x = functional.layer_norm(layer(x), (4,))
        return self.leave(x)


class Skipping(Small):
    """What every layer adds is read behind the last one, so that none may be left out."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x, each = sample * timestep, []
        for layer in self.layers:
            each.append(layer.branch(x))
            x = x + each[-1]
        return self.leave(torch.cat([x, *each], 1))


class Squeezed(Small):
    """Every layer's stream is gated by its own mean, which only the blocks before it tell."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * timestep
        for layer in self.layers:
            x = x * x.mean(1, keepdim=True).sigmoid() + layer.branch(x)
        return self.leave(x)


class Plain(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample * timestep


class Attending(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        q = (sample * timestep).unsqueeze(1)
        return functional.scaled_dot_product_attention(q, q, q).squeeze(1)


def test_declines_with_the_reason(capture_module):
    assert declined(small(capture_module), every=1) == "every step is computed, so none would reuse"
    assert declined(small(capture_module), steps=[0, 1], of=2) == "every step is computed, so none would reuse"
    assert declined(small(capture_module), head=3).startswith("the stack has 3 blocks, and the first 3")
    assert declined(small(capture_module), method="threshold", head=0).startswith("a threshold is measured on blocks")
    assert "normalised between additions (post-norm, at (root))" in declined(small(capture_module, PostNorm))
    assert "is scaled by what the range computes" in declined(small(capture_module, Squeezed))
    assert "there are no blocks" in declined(small(capture_module, Plain))
    assert declined(small(capture_module, Skipping)).startswith("reusing the range spares nothing")
    assert "no attention of these kinds" in declined(small(capture_module), method="attention")
    _, record = cache(small(capture_module, Attending), method="attention")
    assert not record.modified
    assert [item.reason.split(" residual")[0] for item in record.declined] == [
        "its result is not added to a",
        "no attention of these kinds is added to a",
    ]


def test_a_second_run_changes_nothing(capture_module):
    after, _ = cache(small(capture_module))
    assert declined(after) == "the steps are split already: full, reuse"


def test_refuses_what_is_not_there(capture_module):
    program = small(capture_module)
    with pytest.raises(UserError, match=r"no block is called 'layer.1'; did you mean 'layers.1'"):
        cache(program, blocks="layer.1")
    with pytest.raises(UserError, match=r"there are no blocks 1-7: the stack has 3, counted from 0"):
        cache(program, blocks="1-7")
    with pytest.raises(UserError, match=r"not in a row: layers.1 lies between them"):
        cache(program, blocks="layers.0, layers.2")
    with pytest.raises(UserError, match="within is no option of method: threshold, which has cooldown"):
        cache(program, method="threshold", within=(0, 500))
    with pytest.raises(UserError, match="steps and of belong together"):
        cache(program, steps=[0, 2])
    with pytest.raises(UserError, match="every and within are another schedule"):
        cache(program, steps=[0, 2], of=4, within=(0, 500))
    for steps in ([], [1, 2], [0, 2, 1], [0, 0], [0, 4]):
        with pytest.raises(UserError, match="0 and later steps below of, in order"):
            cache(program, steps=steps, of=4)
    with pytest.raises(UserError, match="the lower timestep first"):
        cache(program, within=(500, 0))
    with pytest.raises(UserError, match="blocks says where the range begins, and head would"):
        cache(program, blocks="1-2", head=2)
    with pytest.raises(UserError, match="the model has no loop"):
        cache(replace(program, loop=None))


def test_options_of_a_lock_file_are_taken_back():
    """A lock file has every option of a pass, those of other methods at their defaults."""
    for method in ("interval", "threshold", "taylor", "attention"):
        record = CacheBlocks.from_options({"method": method}, owner="cache-blocks")
        assert CacheBlocks.from_options(record.as_options(), owner="cache-blocks") == record


@pytest.mark.parametrize("method", ["interval", "taylor"])
def test_listed_steps(method, capture_module):
    program = small(capture_module)
    after, _ = cache(program, method=method, steps=[0, 3], of=5)
    module, inputs = program_module(after), calls(program, [0.1] * 5)
    found, whole = answers(program, module, inputs), answers(program, program_module(program), inputs)
    assert [torch.equal(*pair) for pair in zip(found, whole, strict=True)] == [True, False, False, True, False]


@pytest.mark.parametrize("blocks", ["1-2", "layers.1 layers.2", "layers.[12]"])
def test_a_range_by_number_and_by_path(blocks, capture_module):
    program = small(capture_module)
    named, _ = cache(program, blocks=blocks)
    default, _ = cache(program)
    assert [graph_text(g) for g in named.entries.values()] == [graph_text(g) for g in default.entries.values()]


def test_unets_are_declined_unless_blocks_are_named():
    """SDXL's transformers hold two equal blocks each; no stack holds half of the model."""
    graph = denoiser("SDXL UNet")
    weights = WeightStore(
        {
            str(n.target): Absent(str(n.target), tuple(n.meta["val"].shape), n.meta["val"].dtype)
            for n in graph.fx.nodes
            if n.op == "get_attr"
        }
    )
    program = Program({"full": graph}, weights, Origin("test"), single_step("full", graph.signature))
    assert "name blocks, or cut the model at a module" in declined(program)
    path = "down_blocks.0.attentions.0.transformer_blocks"
    _, record = cache(program, blocks=f"{path}.1")
    assert record.sites == (f"{path}.1",)
    assert record.after.entries["reuse"].totals.macs < record.after.entries["full"].totals.macs


# Models against eager hooks.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Program, Any]]:
    found: dict[str, tuple[Program, Any]] = {}

    def model(name: str) -> tuple[Program, Any]:
        if name not in found:
            found[name] = sampled(name, tmp_path_factory.mktemp("model"))
        return found[name]

    return model


def calls(program: Program, amplitudes: list[float], time: float | None = None) -> list[dict[str, Tensor]]:
    """A generation's inputs: samples that move by ``amplitudes`` along one direction, timesteps that fall (or stay)."""
    assert program.loop is not None
    call = call_interface(program.loop, program.interfaces)
    inputs = random_inputs(call.inputs_at(), program.ranges, seed=1)
    sample, like = inputs[program.loop.sample], inputs[program.loop.timestep]
    direction = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2)).to(sample.dtype)
    made, distance = [], 0.0
    # Flux counts time from 1 to 0, the others from 1000.
    high = program.ranges.get(program.loop.timestep, InputRange(0, 1000)).high
    for index, amplitude in enumerate(amplitudes):
        distance += amplitude
        at = high * (0.9 - index / 50_000) if time is None else time
        moved = sample + distance * direction
        made.append({**inputs, program.loop.sample: moved, program.loop.timestep: torch.full_like(like, at)})
    return made


def answers(program: Program, module: Any, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    assert program.loop is not None
    signature = program.loop.signature
    with torch.no_grad():
        return [
            next(iter(signature.output.flatten(module(**signature.arguments.unflatten(each))).values()))
            for each in inputs
        ]


def assert_close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).abs().max()) <= rtol * float(want.abs().max())


MOVES = [0.0, 0.05, 0.02, 0.3, 0.01, 0.02, 0.5]


def first_and_last(module: Any) -> tuple[nn.Module, nn.Module]:
    """The second block, and the norm behind the last."""
    blocks = module.blocks if hasattr(module, "blocks") else module.transformer_blocks
    return blocks[1], module.norm_out


@pytest.mark.parametrize(
    "name", ["DiT-XL/2", "Flux.1", "SD 3 medium", "Wan 2.1 text-to-video 1.3B", "LTX-Video", "Latte-1"]
)
def test_interval_is_what_hooks_give(name, models):
    program, module = models(name)
    after, record = cache(program, every=3)
    looped = program_module(after)
    inputs = calls(program, MOVES)
    step = iter(range(len(inputs)))
    first, last = first_and_last(module)
    computed = {"now": True}
    expected = []
    with range_cache(first, last, lambda: computed["now"], Kept()):
        for each in inputs:
            computed["now"] = next(step) % 3 == 0
            expected += answers(program, module, [each])
    found = answers(program, looped, inputs)
    assert_close(found, expected)
    assert looped.statistics == {"full": 3, "reuse": 4}
    # Steps that are computed are what the model gave, to the bit.
    whole = answers(program, program_module(program), inputs)
    assert all(torch.equal(found[i], whole[i]) for i in (0, 3, 6))
    assert not torch.equal(found[1], whole[1])
    entries = record.after.entries
    assert entries["reuse"].totals.macs < 0.5 * entries["full"].totals.macs == 0.5 * record.before.totals.macs


@pytest.mark.parametrize("method", ["interval", "threshold", "attention"])
@pytest.mark.parametrize("name", ["Flux.1", "Latte-1"])
def test_reuse_with_the_same_steps_state_is_the_full_step(name, method, models):
    program, _ = models(name)
    after, _ = cache(program, method=method)
    assert_steps_agree(program, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Flux.1", "SD 3.5 medium", "HunyuanVideo", "CogVideoX 2B"])
def test_every_range(name, models):
    """From any block to any other, out of two streams and into the one that they become."""
    program, _ = models(name)
    count = 6 if name in ("Flux.1", "HunyuanVideo") else 3
    for first in range(1, count):
        for last in range(first, count):
            for method in ("interval", "threshold"):
                after, record = cache(program, method=method, blocks=f"{first}-{last}")
                assert record.modified
                assert_steps_agree(program, after)


def assert_steps_agree(program: Program, after: Program) -> None:
    """A computed step is the model's to the bit; one that reuses what the same step computed, to rounding."""
    assert after.loop is not None
    [inputs] = calls(program, [0.0])
    runners = program_runners(after)
    expected = program_runners(program)["full"](inputs)
    for variant, chain in after.loop.variants.items():
        states: dict[str, Tensor] = {}
        given = dict(inputs)
        for state in after.loop.states.values():
            given[f"past.{state.name}"] = torch.zeros(state.shape, dtype=state.dtype)
        for entry in (*after.loop.variants[after.loop.computed], *chain):
            states = runners[entry](given)
            given |= {key.replace("present.", "past."): value for key, value in states.items()}
        for output, value in expected.items():
            error = (states[output] - value).abs().max() / value.abs().max()
            assert float(error) <= (0.0 if variant == after.loop.computed else SMALL)


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_diffusers_extrapolation(order, models):
    program, module = models("Wan 2.1 text-to-video 1.3B")
    after, _ = cache(program, method="taylor", every=3, order=order)
    inputs = calls(program, [0.1] * 9)
    memory = Extrapolated(order)
    computed = {"now": True}
    expected = []
    with range_cache(*first_and_last(module), lambda: computed["now"], memory):
        for step, each in enumerate(inputs):
            computed["now"] = step % 3 == 0
            memory.tick()
            expected += answers(program, module, [each])
    assert_close(answers(program, program_module(after), inputs), expected)
    kept, _ = cache(program, every=3)
    plain = answers(program, program_module(kept), inputs)
    assert float((plain[5] - expected[5]).abs().max()) > 1e-3


def test_taylor_extrapolates_what_is_linear_exactly(capture_module):
    """A residual that grows by the same amount each step is predicted to rounding by order 1."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            x = sample + self.a(sample)
            return x + self.b(x)

    program = small(capture_module, Growing)
    after, _ = cache(program, method="taylor", every=2, order=1)
    inputs = calls(program, [0.1] * 6)
    found, expected = (answers(program, program_module(each), inputs) for each in (after, program))
    assert_close(found[3::2], expected[3::2])
    assert float((found[1] - expected[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["DiT-XL/2", "Flux.1", "Wan 2.1 text-to-video 1.3B", "LTX-Video"])
def test_threshold_is_diffusers_first_block_cache(name, models):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    program, module = models(name)
    threshold = 0.05
    after, _ = cache(program, method="threshold", threshold=threshold)
    inputs = calls(program, MOVES)
    apply_first_block_cache(module, FirstBlockCacheConfig(threshold))
    try:
        _set_cache_context(module, CacheContext("cond"))
        expected = answers(program, module, inputs)
    finally:
        _remove_hooks(module)
    looped = program_module(after)
    assert_close(answers(program, looped, inputs), expected)
    assert 1 < looped.statistics["body"] < looped.statistics["head"] == len(inputs)
    assert after.loop is not None
    assert isinstance(after.loop.schedule, Adaptive)


def _remove_hooks(module: nn.Module) -> None:
    for each in module.modules():
        registry = getattr(each, "_diffusers_hook", None)
        if registry is not None:
            for hook in list(registry._hook_order):
                registry.remove_hook(hook, recurse=False)


def test_attention_is_diffusers_pyramid_broadcast(models):
    """At one time all gates are those of the computed step, so that keeping before or after them is the same."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    program, module = models("Latte-1")
    after, record = cache(program, method="attention", within=(100, 800))
    assert len(record.sites) == 9
    inputs = calls(program, [0.05] * 13, time=500.0)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=6,
        spatial_attention_block_identifiers=(r"^transformer_blocks",),
        temporal_attention_block_identifiers=(r"^temporal_transformer_blocks",),
        cross_attention_block_identifiers=(r"^transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(module, config)
    try:
        expected = answers(program, module, inputs)
    finally:
        _remove_hooks(module)
    looped = program_module(after)
    assert_close(answers(program, looped, inputs), expected)
    assert looped.statistics == {
        "full": 2,
        "reuse-spatial-temporal-cross": 6,
        "reuse-temporal-cross": 2,
        "reuse-cross": 2,
        "reuse-temporal": 1,
    }


def test_attention_of_some_blocks_and_kinds(models):
    program, _ = models("Latte-1")
    after, record = cache(program, method="attention", temporal=1, cross=3, blocks="1-2")
    assert after.loop is not None
    assert list(after.loop.variants) == ["full", "reuse-spatial-cross", "reuse-cross", "reuse-spatial"]
    assert set(record.sites) == {f"transformer_blocks.{i}.attn{j}" for i in (1, 2) for j in (1, 2)}
    reasons = {item.path: item.reason for item in record.declined}
    assert reasons["transformer_blocks.0.attn1"] == "outside of the blocks '1-2'"
    assert reasons["temporal_transformer_blocks.2.attn1"] == "with temporal: 1 it is computed in every step"


def test_intervals_without_a_common_period(models):
    """Nobody waits for the product of three primes."""
    program, _ = models("Latte-1")
    after, _ = cache(program, method="attention", spatial=997, temporal=991, cross=983)
    assert after.loop is not None
    assert isinstance(after.loop.schedule, Cycle)
    assert len(after.loop.schedule.variants) == 1000
    assert compared_calls(after.loop) == 100


@pytest.mark.parametrize("options", [{"method": "threshold", "threshold": 0.05}, {"method": "taylor"}])
def test_composes_with_hoisting_in_both_orders(options, models):
    program, _ = models("SD 3 medium")
    inputs = calls(program, MOVES)
    hoist = Step("hoist-invariants", HoistInvariants())
    cached, _ = cache(program, **options)
    expected = answers(program, program_module(cached), inputs)
    for after in (run_pass(cached, hoist)[0], cache(run_pass(program, hoist)[0], **options)[0]):
        assert after.loop is not None
        assert after.loop.tables
        assert_close(answers(program, program_module(after), inputs), expected, 0.0)


def test_half_precision_stays_half(capture_module):
    """Clocks are float32, and what is computed with them is not."""
    program, _ = capture_module(
        lambda: Small().half(), sample=torch.zeros(2, 5, 4).half(), timestep=torch.tensor(1.0).half()
    )
    program = replace(program, loop=single_step("full", program.entries["full"].signature))
    after, _ = cache(program, method="taylor", order=2)
    assert after.loop is not None
    assert {state.dtype for state in after.loop.states.values()} == {torch.float16}
    found = answers(program, program_module(after), calls(program, [0.1] * 6))
    assert all(each.dtype == torch.float16 and each.isfinite().all() for each in found)


OPEN = """
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.leave = nn.ModuleList([Layer(), Layer(), Layer()]), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        x = sample * timestep.cos()
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)
"""


@pytest.mark.parametrize("method", ["taylor", "threshold"])
def test_open_sizes_through_onnx_runtime(method, capture_open, tmp_path):
    """Batches and tokens open; a computed step is what the engine without a cache gives."""
    example = '{"sample": torch.zeros(2, 5, 4), "timestep": torch.tensor(1.0)}'
    program = capture_open(OPEN, example, {"sample": [Span(2, 8), Span(3, 9), 4]})
    program = replace(program, loop=single_step("full", program.entries["full"].signature))
    whole = _engines(program, tmp_path / "whole")
    after, _ = cache(program, method=method, **({"threshold": 0.05} if method == "threshold" else {}))
    engines, eager = _engines(after, tmp_path / method), program_module(after)
    for batch, tokens in ((2, 9), (8, 3)):
        sample = torch.randn(batch, tokens, 4)
        inputs = [{"sample": sample * (1 + move), "timestep": torch.tensor(1 - move)} for move in MOVES]
        found = answers(program, engines, inputs)
        assert_close(found, answers(program, eager, inputs))
        assert_close(found[:1], answers(program, whole, inputs[:1]), SMALL)
    assert engines.statistics == eager.statistics
    assert min(engines.statistics.values()) > 0


def _engines(program: Program, folder: Path) -> Any:
    folder.mkdir()
    runners = {}
    for name, entry in OnnxRuntime(threads=1).lower(program, Lowering(folder)).items():
        record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
        runners[name] = OnnxRuntime.load(folder, record, {"threads": 1})
    return engine_module(program, runners)
