"""AdaCache as a pass, against the released scheduler written out: two tensors kept for each block, added one by one.

python -m pytest tests/passes/test_cache_adaptive.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases_diffusers import CASES
from torch import Tensor, nn

from optpass.analysis.cost import measure
from optpass.analysis.generation import generation_cost
from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference
from optpass.ir.loop import Adaptive, single_step
from optpass.ir.program import InputRange, Program
from optpass.passes.cache_adaptive import PRESETS, CacheAdaptive
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import Step, find_recipe, load_recipe
from optpass.rewrite.shortcuts import NotCarriedError
from optpass.runtime.looped import program_module
from optpass.testing import capture_module

FRAMES, TOKENS, WIDTH, DEPTH = 3, 4, 8, 4
EVERY_STEP = {1e9: 1}


class Attention(nn.Module):
    """Of one head; keys and values from ``context`` where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(source), self.v(source)))


class Block(nn.Module):
    """STDiT's: attention over space or time, attention to the context, feed-forward, gated by the timestep."""

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attention, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def first(self, x: Tensor, gate: Tensor) -> Tensor:
        """What attention adds, in the layout that it mixes: [B·T, S, C], or [B·S, T, C]."""
        b = x.shape[0]
        grid = x.reshape(b, FRAMES, TOKENS, WIDTH)
        if self.temporal:
            grid = grid.transpose(1, 2)
        rows = grid.reshape(-1, grid.shape[2], WIDTH)
        return gate * self.attention(self.norm1(rows))

    def joined(self, p: Tensor, batch: int) -> Tensor:
        grid = p.reshape(batch, -1, p.shape[1], WIDTH)
        if self.temporal:
            grid = grid.transpose(1, 2)
        return grid.reshape(batch, FRAMES * TOKENS, WIDTH)

    def forward(self, x: Tensor, context: Tensor, gate: Tensor) -> Tensor:
        x = x + self.joined(self.first(x, gate), x.shape[0])
        x = x + self.cross(x, context)
        return x + gate * self.mlp(self.norm2(x))


class Video(nn.Module):
    """Spatial and temporal blocks in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(temporal=bool(index % 2)) for index in range(DEPTH))

    def gate(self, timestep: Tensor) -> Tensor:
        return torch.sigmoid(self.time(timestep.reshape(1, 1) / 1000))

    def forward(self, hidden_states: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        x, gate = self.enter(hidden_states), self.gate(timestep)
        for block in self.blocks:
            x = block(x, context, gate)
        return self.leave(x)


class Released:
    """The released implementation's loop, for one generation of ``steps``: counters, rates and caches by block."""

    def __init__(self, net: Video, book: dict[float, int], steps: int, moreg: tuple[int, int] | None = None) -> None:
        self.net, self.book, self.steps, self.moreg = net, book, steps, moreg
        self.forward_id, self.rate, self.last = 0, 1, 0
        self.caches: list[list[Tensor]] = [[] for _ in net.blocks]
        self.previous_moreg = 1.0
        self.computed: list[int] = []

    def __call__(self, hidden_states: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        self.forward_id += 1
        always = self.forward_id in (1, self.steps - 1, self.steps)
        compute = always or self.forward_id == self.last + self.rate
        with torch.no_grad():
            x, gate = self.net.enter(hidden_states), self.net.gate(timestep)
            for index, block in enumerate(self.net.blocks):
                x = self._block(index, block, x, context, gate) if compute else self._reused(index, block, x)
            if compute:
                self.last = self.forward_id
                self.computed.append(self.forward_id)
            return self.net.leave(x)

    def _block(self, index: int, block: Any, x: Tensor, context: Tensor, gate: Tensor) -> Tensor:
        p = block.first(x, gate)
        y = x + block.joined(p, len(x))
        q = block.cross(y, context)
        r = gate * block.mlp(block.norm2(y + q))
        if index == 1 and self.caches[index]:
            self._decide(p, self.caches[index][0])
        self.caches[index] = [p, q + r]
        return y + (q + r)

    def _reused(self, index: int, block: Any, x: Tensor) -> Tensor:
        p, rest = self.caches[index]
        return x + block.joined(p, len(x)) + rest

    def _decide(self, p: Tensor, cache: Tensor) -> None:
        distance = self.forward_id - self.last
        change = float((cache - p).abs().sum() / cache.abs().sum()) / distance
        if self.moreg:
            change *= self._motion(p, distance)
        *bounded, (_, slowest) = sorted(self.book.items())
        self.rate = next((rate for bound, rate in bounded if change < bound), slowest)

    def _motion(self, p: Tensor, distance: int) -> float:
        assert self.moreg
        if not self.moreg[0] <= self.forward_id <= self.moreg[1]:
            self.previous_moreg = 1.0
            return 1.0
        later, earlier = p[:, 1:], p[:, :-1]
        norm = float((later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum()))
        moreg = (norm / 0.385) ** 8
        gradient = 10 * (moreg - self.previous_moreg) / distance
        self.previous_moreg = moreg
        return moreg + abs(gradient)


@pytest.fixture(scope="module")
def captured() -> tuple[Program, Video]:
    program, net = capture_module(
        Video,
        hidden_states=torch.zeros(2, FRAMES * TOKENS, 4),
        timestep=torch.tensor(1.0),
        context=torch.zeros(2, 5, WIDTH),
    )
    ranges = {"timestep": InputRange(0, 1000, "uniform")}
    return replace(program, loop=single_step("full", program.entries["full"].signature), ranges=ranges), net


def adaptive(program: Program, **options: Any) -> Program:
    return run_passes(program, [Step("cache-adaptive", CacheAdaptive.from_options(options, owner="cache-adaptive"))])[0]


def generation(call: Callable[..., Any], steps: int, stride: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, FRAMES * TOKENS, 4, generator=generator)
    context = torch.randn(2, 5, WIDTH, generator=generator)
    answers = []
    for index in range(steps):
        answers.append(call(sample, torch.tensor(999.0 * (1 - index / steps)), context))
        sample = sample - stride * answers[-1]
    return answers


BOOK = {0.05: 4, 0.064: 3, 0.08: 2, 1.0: 1}


@pytest.mark.parametrize("moreg", [None, (3, 20)])
def test_every_step_is_as_the_released_loop_makes_it(captured, moreg):
    program, net = captured
    options = {"motion": True, "motion_steps": moreg} if moreg else {}
    module = program_module(adaptive(program, codebook=BOOK, of=24, **options))
    oracle = Released(net, BOOK, 24, moreg)
    for found, expected in zip(generation(module, 24), generation(oracle, 24), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6 * float(expected.abs().max()), rtol=0)
    assert module.statistics == {"full": len(oracle.computed), "reuse": 24 - len(oracle.computed)}
    # Several rates occurred, or the test would say little.
    distances = {b - a for a, b in zip(oracle.computed, oracle.computed[1:], strict=False)}
    assert len(distances) > 2, oracle.computed


def test_a_codebook_of_ones_is_no_caching_to_the_bit(captured):
    program, _ = captured
    module = program_module(adaptive(program, codebook=EVERY_STEP, of=12))
    for found, expected in zip(generation(module, 12), generation(program_module(program), 12), strict=True):
        assert torch.equal(found, expected)
    assert module.statistics == {"full": 12}


def test_a_reusing_step_with_the_same_steps_residual_is_the_full_step(captured):
    from optpass.evaluate.difference import program_runners

    program, _ = captured
    after = adaptive(program, codebook=EVERY_STEP)
    runners = program_runners(after)
    tensors = {
        "hidden_states": torch.randn(2, FRAMES * TOKENS, 4),
        "timestep": torch.tensor(400.0),
        "context": torch.randn(2, 5, WIDTH),
    }
    zeros = {spec.name: torch.zeros(spec.shape) for spec in after.entries["full"].inputs if spec.name not in tensors}
    full = runners["full"]({**tensors, **zeros})
    states = {name.replace("present.", "past."): value for name, value in full.items()}
    reused = runners["reuse"]({**tensors, **states})["output"]
    torch.testing.assert_close(reused, full["output"], atol=1e-6, rtol=0)


def test_one_tensor_lives_between_steps_beside_the_measured_one(captured):
    program, _ = captured
    loop = adaptive(program, codebook="open-sora-30-fast", of=30).loop
    assert loop is not None
    measured = [name for name in loop.states if name.endswith(".measured")]
    assert measured == ["blocks.1.attention.measured"]
    assert {loop.states[name].shape for name in loop.states if name not in measured} == {(2, FRAMES * TOKENS, WIDTH)}
    assert len(loop.states) == 2
    assert isinstance(loop.schedule, Adaptive)
    assert loop.schedule.options["codebook"] == {str(k): v for k, v in PRESETS["open-sora-30-fast"].items()}


def test_others_can_be_measured(captured):
    program, _ = captured
    loop = adaptive(program, codebook=BOOK, measure="blocks.0.attention blocks.2.attention").loop
    assert loop is not None
    assert [name for name, state in loop.states.items() if state.initial == "zeros"] == [
        "blocks.0.attention.measured",
        "blocks.2.attention.measured",
    ]


def test_a_residual_of_zeros_computes_every_step(captured):
    """STDiT begins with zeros where residuals leave; 0 / 0 is no number, and gets the last rate."""
    program, _ = captured
    zeros = {
        name: replace(expression, value=torch.zeros(expression.shape))
        for name, expression in program.weights.items()
        if ".attention.out." in name
    }
    module = program_module(adaptive(program.with_weights(zeros), codebook=BOOK, of=10))
    generation(module, 10)
    assert module.statistics == {"full": 10}


def test_a_program_that_is_told_its_steps_at_run_time_is_verified_over_a_walk(captured):
    """A recipe may leave out ``of``."""
    program, _ = captured
    after = adaptive(program, codebook=EVERY_STEP)
    assert after.loop.schedule.of is None
    assert program_difference(program, after).relative_error <= 1e-6


def test_the_number_of_steps_has_to_be_known(captured):
    module = program_module(adaptive(captured[0], codebook=BOOK))
    with pytest.raises(UserError, match=r"set module\.steps"):
        generation(module, 2)
    module.steps = 4
    generation(module, 4)
    with pytest.raises(UserError, match="made for 4 steps"):
        generation(module, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook": "open-sora"}, "no preset 'open-sora'; did you mean 'open-sora-"),
        ({"codebook": {0.1: 0}}, "rates of 1 or more"),
        ({"codebook": BOOK, "measure": "blocks.9"}, r"measure: no residual is of 'blocks\.9'"),
        ({"codebook": BOOK, "motion": True, "measure": "blocks.2.mlp"}, "tokens_per_frame"),
        ({"codebook": BOOK, "motion": True, "tokens_per_frame": 40, "measure": "blocks.2.mlp"}, "not several frames"),
    ],
)
def test_what_is_refused(options, message, captured):
    with pytest.raises(UserError, match=message):
        adaptive(captured[0], **options)


def test_motion_of_tokens_that_hold_all_frames(captured):
    module = program_module(
        adaptive(captured[0], codebook=BOOK, of=8, motion=True, measure="blocks.2.mlp", tokens_per_frame=TOKENS)
    )
    generation(module, 8)
    assert module.statistics["full"] >= 4


def test_a_second_run_changes_nothing(captured):
    once = adaptive(captured[0], codebook=BOOK)
    _, [record] = run_passes(once, [Step("cache-adaptive", CacheAdaptive(codebook=BOOK))])  # type: ignore[call-arg]
    assert not record.modified
    assert "split already" in record.declined[0].reason


def test_latte_measures_its_middle_attention_over_frames(tmp_path):
    """The recipe's passes on diffusers' own class: blocks in two lists that take turns."""
    case = next(case for case in CASES if case.name == "Latte-1")
    (tmp_path / "config.json").write_text(json.dumps({**case.config, "num_layers": 4}))
    sizes = {name: list(size) for name, size in case.inputs.items()}
    program = capture(str(tmp_path), inputs=sizes, structure_only=True)
    steps = load_recipe(find_recipe("adacache-latte")).steps
    after, records = run_passes(program, steps)
    assert [record.name for record in records] == ["cache-adaptive", "hoist-invariants"]
    assert records[0].sites == tuple(f"transformer_blocks.{i}+temporal_transformer_blocks.{i}" for i in range(4))
    assert after.loop is not None
    measured = [name for name in after.loop.states if name.endswith(".measured")]
    assert measured == ["temporal_transformer_blocks.1.attn1.measured"]
    full, reuse = (generation_cost(after, 50).calls[name] for name in ("full", "reuse"))
    assert (full, reuse) == (50, 0)
    cost = measure(after).entries
    assert cost["reuse"].totals.macs < 0.05 * cost["full"].totals.macs


def test_a_refusal_after_the_first_insertions_changes_nothing(captured, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotCarriedError("a stream ends")

    monkeypatch.setattr("optpass.passes.cache_adaptive.interval_entries", refuse)
    _, [record] = run_passes(captured[0], [Step("cache-adaptive", CacheAdaptive(codebook=BOOK))])  # type: ignore[call-arg]
    assert (record.modified, [item.reason for item in record.declined]) == (False, ["a stream ends"])


def test_a_model_without_a_loop_is_refused(captured):
    with pytest.raises(UserError, match="the model has no loop"):
        adaptive(replace(captured[0], loop=None), codebook=BOOK)
