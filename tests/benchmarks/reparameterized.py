"""``reparameterize`` on published architectures: counts beside the papers', and ONNX Runtime before and after."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optpass.capture.timm_import import timm_importable
from optpass.evaluate.difference import outputs_difference
from optpass.evaluate.latency import Comparison, compare_latency
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program
from optpass.pipeline.manager import PassRecord, run_pass
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import Lowering, Runner
from optpass.testing import capture_module

PUBLISHED = {"repvgg_a0": (8.31e6, 1.36e9), "mobileone_s0": (2.08e6, 275e6)}
"""Parameters and MACs of the models for inference: RepVGG, arXiv 2101.03697; MobileOne, arXiv 2206.04040."""

OTHERS = (
    "fastvit_t8",
    "efficientnet_b0",
    "mobilenetv4_conv_small",
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "deit_tiny_patch16_224",
)
SIDE, RUNS, WARMUP, THREADS = 224, 50, 5, 1

INTRODUCTION = f"""# reparameterize

Architectures of timm with random weights (BatchNorm statistics too), one image of {SIDE}×{SIDE}, float32. A site is an
operator that was put in place of several. **published** are the authors' models for inference."""


@dataclass(frozen=True)
class Pair:
    """An architecture before the pass and after it."""

    name: str
    before: Program
    after: Program
    record: PassRecord


def reparameterized() -> str:
    """The results as Markdown."""
    pairs = {name: _pair(name) for name in (*PUBLISHED, *OTHERS)}
    lines = [INTRODUCTION, "", *_published(pairs), "", *_latency(pairs), "", *_sites(pairs)]
    return "\n".join(lines)


def _pair(name: str) -> Pair:
    with timm_importable():
        import timm
    program, _ = capture_module(lambda: timm.create_model(name), x=torch.zeros(1, 3, SIDE, SIDE))
    [step] = make_recipe({"passes": ["reparameterize"], "target": "onnxruntime"}).steps
    after, record = run_pass(program, step)
    return Pair(name, program, after, record)


def _published(pairs: dict[str, Pair]) -> list[str]:
    lines = ["| | trained form | optpass | published |", "|---|---|---|---|"]
    for name, (parameters, macs) in PUBLISHED.items():
        before, after = pairs[name].record.before.totals, pairs[name].record.after.totals
        counts = (before.parameters / 1e6, after.parameters / 1e6, parameters / 1e6)
        lines.append(f"| {name}, parameters, M | {counts[0]:.3f} | {counts[1]:.3f} | {counts[2]:.2f} |")
        lines.append(f"| {name}, MMAC | {before.macs / 1e6:.1f} | {after.macs / 1e6:.1f} | {macs / 1e6:.0f} |")
    return lines


def _latency(pairs: dict[str, Pair]) -> list[str]:
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "timm"))
    lines = [
        f"ONNX Runtime on {os.cpu_count()} CPU cores ({platform.machine()}), shared, {THREADS} thread, its own fusions",
        "on for both (it folds a BatchNorm into the convolution before it itself). The engines are called in turn,",
        f"{RUNS} times each: medians, and p10 … p90 of the pairs' ratios. {versions}.",
        "",
        "| | before, ms | after, ms | ratio after / before (p10 … p90) | relative error of the engine |",
        "|---|---|---|---|---|",
    ]
    for name in PUBLISHED:
        found, error = _compared(pairs[name])
        ratio = f"{found.ratio.median:.3f} ({found.ratio.p10:.3f} … {found.ratio.p90:.3f})"
        lines.append(f"| {name} | {found.before.median:.2f} | {found.after.median:.2f} | {ratio} | {error:.1g} |")
    return lines


def _compared(pair: Pair) -> tuple[Comparison, float]:
    """The latency of both engines, and how far the second's outputs are from the first's."""
    inputs = random_inputs(pair.before.entries["full"].inputs_at(), {}, seed=0)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        before, after = _engine(pair.before, Path(first)), _engine(pair.after, Path(second))
        error = outputs_difference(before(inputs), after(inputs)).relative_error
        timed = compare_latency(("before", before), ("after", after), [inputs], runs=RUNS, warmup=WARMUP)
    return timed, error


def _engine(program: Program, folder: Path) -> Runner:
    target: Any = target_class("onnxruntime")
    made = target(threads=THREADS)
    entry = made.lower(program, Lowering(folder))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs], "details": entry.details}
    return target.load(folder, record, {"threads": THREADS})


def _sites(pairs: dict[str, Pair]) -> list[str]:
    lines = [
        "| architecture | sites | declined | operators | parameters, M | MMAC | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pair in pairs.items():
        before, after, record = pair.record.before.totals, pair.record.after.totals, pair.record
        nodes = [len(program.entries["full"].calls) for program in (pair.before, pair.after)]
        cells = [
            name,
            str(len(record.sites)),
            str(len(record.declined)),
            f"{nodes[0]} → {nodes[1]}",
            f"{before.parameters / 1e6:.3f} → {after.parameters / 1e6:.3f}",
            f"{before.macs / 1e6:.1f} → {after.macs / 1e6:.1f}",
            f"{record.seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
