"""What ``hoist-invariants`` saves: MACs and weights of published models, and the time of engines that run here."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from optpass.analysis.cost import measure
from optpass.analysis.generation import generation_cost
from optpass.capture.sources import capture
from optpass.evaluate.difference import runners_difference
from optpass.evaluate.latency import Comparison, compare_latency
from optpass.evaluate.quality import psnr
from optpass.evaluate.walks import walk
from optpass.ir.interface import Interface
from optpass.ir.program import Program
from optpass.pipeline.apply import apply
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.class_to_video import ClassToVideoPipeline
from optpass.runtime.loading import load
from optpass.testing import randomised

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "configs"
DIGITS = ROOT / "tests" / "checkpoints" / "moving-digits"
GUIDED, CLIPS, TIMED_STEPS, RUNS = 2, 4, 20, 8
"""Batch with guidance; clips that are compared; steps of a timed generation, and timed generations."""


@dataclass(frozen=True)
class Model:
    """A published model: its config, the sizes and the number of steps that are reckoned, passes before."""

    name: str
    config: Path | Mapping[str, Any]
    steps: int
    inputs: Mapping[str, Sequence[int]]
    passes: tuple[str, ...] = ()


MODELS = (
    Model("SD 1.5, 512²", CONFIGS / "sd15-unet", 50, {"sample": (2, 4, 64, 64)}),
    Model("SVD, 14 × 1024 × 576", CONFIGS / "svd-unet", 25, {"sample": (2, 14, 8, 72, 128)}),
    Model(
        "SVD, single-token-attention before", CONFIGS / "svd-unet", 25, {"sample": (2, 14, 8, 72, 128)},
        ("single-token-attention",),
    ),
    Model(
        "DiT-XL/2, 256²",
        {"_class_name": "DiTTransformer2DModel", "sample_size": 32, "out_channels": 8, "num_layers": 28},
        250,
        {"hidden_states": (2, 4, 32, 32)},
    ),
    Model("Flux.1 dev, 1024²", CONFIGS / "flux-transformer", 50, {"hidden_states": (1, 4096, 64)}),
    Model(
        "Wan 2.1 1.3B, 81 × 832 × 480",
        {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        50,
        {"hidden_states": (2, 16, 21, 60, 104)},
    ),
)  # fmt: skip


def hoist() -> str:
    """The two tables as Markdown."""
    return "\n".join(
        [
            "# What hoist-invariants saves",
            "",
            "Structure only, float32: MACs of a generation (attention included, guidance as one batch of two where the",
            "model has it), parameters that a step reads, what is kept for a generation, and what the table of all its",
            "timesteps takes. That of the first generation after loading; later ones find the table.",
            "",
            "| model | steps | TMAC a generation | saved | parameters a step reads, M | kept, MB | table, MB |",
            "|---|---|---|---|---|---|---|",
            *map(_saved, MODELS),
            "",
            "Measured: engines of ONNX Runtime, float32, one thread each, with and without the pass;",
            f"{RUNS} generations of {TIMED_STEPS} steps each, in turn, after one to warm up. The ratio is that of the",
            "times of two generations in a row (p10 … p90): below 1 the hoisted one is faster.",
            f"{os.cpu_count()} CPU cores ({platform.machine()}), shared.",
            "",
            "| engine | GMAC a generation | ms a step | ratio | largest relative error | samples |",
            "|---|---|---|---|---|---|",
            _digits(),
            _dit(),
        ]
    )


def _saved(model: Model) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config = model.config
        if not isinstance(config, Path):
            Path(folder, "config.json").write_text(json.dumps(dict(config)), "utf-8")
            config = Path(folder)
        captured = capture(config, inputs=dict(model.inputs), structure_only=True)
    before, _ = run_passes(captured, make_recipe({"passes": list(model.passes)}).steps)
    after, _ = run_passes(before, make_recipe({"passes": ["hoist-invariants"]}).steps)
    was, now = (generation_cost(program, model.steps).macs / 1e12 for program in (before, after))
    parameters = [measure(program).entries["full"].totals.parameters / 1e6 for program in (before, after)]
    assert after.loop is not None
    once, tables = (_kept(after, entries) / 1e6 for entries in (after.loop.once, after.loop.tables))
    return (
        f"| {model.name} | {model.steps} | {was:,.2f} → {now:,.2f} | {100 * (1 - now / was):.2f} %"
        f" | {parameters[0]:,.0f} → {parameters[1]:,.0f} ({100 * (parameters[1] / parameters[0] - 1):+.0f} %)"
        f" | {once:,.1f} | {tables * model.steps:,.1f} |"
    )


def _kept(program: Program, entries: Sequence[str]) -> float:
    """Bytes of what ``entries`` write in one call."""
    written = [spec for name in entries for spec in Interface.of(program.entries[name]).outputs]
    return sum(prod(int(size) for size in spec.shape) * spec.dtype.itemsize for spec in written)


def _digits() -> str:
    with tempfile.TemporaryDirectory() as folder:
        bundles = _bundles(DIGITS, {"sample": [2, 8, 4, 16, 16]}, Path(folder))
        comparison, error, macs = _compared(DIGITS, {"sample": (2, 8, 4, 16, 16)}, bundles)
        clips = [_clips(bundle) for bundle in bundles]
    return _row("moving-digits", macs, comparison, error, f"{CLIPS} clips, PSNR {min(psnr(*clips), 300):.0f} dB")


def _clips(bundle: Path) -> torch.Tensor:
    pipeline = ClassToVideoPipeline.load(DIGITS, unet=load(bundle))
    pipeline.set_progress_bar_config(disable=True)
    made: torch.Tensor = torch.cat(
        [pipeline([label], num_inference_steps=TIMED_STEPS, seed=label).frames for label in range(CLIPS)]
    )
    return made


def _dit() -> str:
    from diffusers import DiTTransformer2DModel

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=8, sample_size=16
        )
        randomised(model.eval()).save_pretrained(f"{folder}/dit")
        inputs = {"hidden_states": (GUIDED, 4, 16, 16)}
        bundles = _bundles(Path(folder, "dit"), {name: list(shape) for name, shape in inputs.items()}, Path(folder))
        comparison, error, macs = _compared(Path(folder, "dit"), inputs, bundles)
    return _row("DiT-S-like, 8 blocks of 384, 64 tokens", macs, comparison, error, "random weights")


def _bundles(checkpoint: Path, inputs: Mapping[str, Any], folder: Path) -> list[Path]:
    """Without and with the pass."""
    made = []
    for name, passes in (("before", []), ("after", ["hoist-invariants"])):
        settings = {"inputs": inputs, "dtype": "float32", "passes": passes}
        recipe = make_recipe({**settings, "target": {"onnxruntime": {"threads": 1}}})
        request = Request(str(checkpoint), folder / name, verify="never", baseline=False, samples=0)
        made.append(apply(recipe, request).folder)
    return made


def _compared(
    checkpoint: Path, inputs: Mapping[str, Sequence[int]], bundles: Sequence[Path]
) -> tuple[Comparison, float, tuple[float, float]]:
    """Times and answers of both bundles on one generation, and its MACs."""
    program = capture(checkpoint, inputs=dict(inputs), dtype=torch.float32)
    hoisted, _ = run_passes(program, make_recipe({"passes": ["hoist-invariants"]}).steps)
    assert program.loop is not None
    specs = Interface.of(program.entries["full"]).inputs_at()
    calls = walk(program.loop, specs, program.ranges, 0, TIMED_STEPS)
    before, after = (load(bundle).runner for bundle in bundles)
    difference = runners_difference(before, after, calls)
    comparison = compare_latency(("before", before), ("after", after), calls, runs=RUNS, warmup=1)
    macs = tuple(generation_cost(each, TIMED_STEPS).macs / 1e9 for each in (program, hoisted))
    return comparison, difference.relative_error, (macs[0], macs[1])


def _row(name: str, macs: tuple[float, float], found: Comparison, error: float, samples: str) -> str:
    ratio = found.ratio
    return (
        f"| {name} | {macs[0]:,.2f} → {macs[1]:,.2f} | {found.before.median:.1f} → {found.after.median:.1f}"
        f" | {ratio.median:.3f} ({ratio.p10:.3f} … {ratio.p90:.3f}) | {error:.1e} | {samples} |"
    )
