"""SkipAt on DeiT: counts beside those of the released code, and ONNX Runtime before and after."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from engines import timed as timed_beside

from optpass.capture.timm_import import timm_importable
from optpass.ir.program import Program
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import make_recipe
from optpass.testing import capture_module

SIZES = {"tiny": "T", "small": "S", "base": "B"}
RELEASED = {"tiny": (5.77, 1.175, 19), "small": (22.16, 4.439, 19), "base": (86.79, 17.24, 25)}
"""Million parameters and GMAC of the released code at 224×224; per cent more images in a second on an A100."""
TIMED = ("tiny", (224, 384))
RUNS, WARMUP = 40, 5


def skipat(optpass: Callable[..., Any]) -> str:
    """The page; ``optpass`` runs the command with ``--json``."""
    return "\n\n".join([HEAD, _table(COUNTED, _counts(optpass)), _latency_note(), _table(MEASURED, _latencies())])


def _table(head: str, rows: Iterator[str]) -> str:
    return "\n".join([head, "|".join(["", *["---"] * (head.count("|") - 1), ""]), *rows])


def _counts(optpass: Callable[..., Any]) -> Iterator[str]:
    for size, letter in SIZES.items():
        for side in (224, 384):
            before, after = _counted(optpass, size, side)
            released = RELEASED[size] if side == 224 else ("", "")
            cells = [
                f"DeiT-{letter}, {side}×{side}",
                f"{before['parameters'] / 1e6:.2f} → {after['parameters'] / 1e6:.2f}",
                str(released[0]),
                f"{before['macs'] / 1e9:.3f} → {after['macs'] / 1e9:.3f}",
                str(released[1]),
                f"{100 * (after['macs'] / before['macs'] - 1):+.1f} %",
            ]
            yield f"| {' | '.join(cells)} |"


def _counted(optpass: Callable[..., Any], size: str, side: int) -> tuple[dict[str, int], dict[str, int]]:
    config = {"architecture": name_of(size), "pretrained_cfg": {}, "model_args": {"img_size": side}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
        sizes = ("--inputs", f"x=1x3x{side}x{side}")
        made = optpass("apply", "skipat-vit", folder, "-o", f"{folder}/out", "--structure-only", *sizes)
    passes = {item["name"]: item for item in made.record["passes"]}
    record = passes["reuse-attention"]
    return record["before"]["totals"], record["after"]["totals"]


def name_of(size: str) -> str:
    """The architecture as timm calls it."""
    return f"deit_{size}_patch16_224"


def _latency_note() -> str:
    return MEASURING.format(cores=os.cpu_count(), machine=platform.machine(), runs=RUNS)


def _latencies() -> Iterator[str]:
    size, sides = TIMED
    for side in sides:
        program = _weighted(size, side)
        for phi in ("conv", "identity"):
            after, _ = run_passes(program, make_recipe({"passes": [{"reuse-attention": {"phi": phi}}]}).steps)
            found, ratio = (timed := timed_beside(program, after, runs=RUNS, warmup=WARMUP)), timed.ratio
            times = f"{found.before.median:.1f} → {found.after.median:.1f}"
            # Of times after / before; throughput is its inverse.
            share = f"{1 / ratio.median:.2f} ({1 / ratio.p90:.2f} … {1 / ratio.p10:.2f})"
            yield f"| DeiT-{SIZES[size]}, {side}×{side} | {phi} | {times} | {share} |"


def _weighted(size: str, side: int) -> Program:
    with timm_importable():
        import timm
    image = torch.zeros(1, 3, side, side)
    return capture_module(lambda: timm.create_model(name_of(size), img_size=side), x=image)[0]


HEAD = """# SkipAt on DeiT

`reuse-attention` in layers 3 to 8 of 12, in the form that the authors released. Structure only: no weight is read, and
nothing here speaks of quality, which needs training. GMAC count the products inside attention. Venkataramanan et al.,
ICLR 2024, arXiv 2301.02240; the paper's own column of GFLOPs does not follow from its released architecture
(4.0 for S and 15.2 for B), its parameters do. The two linear layers of Φ multiply as much as the four projections that
go: saved are the products of tokens with tokens, of which there are few at 224×224."""
COUNTED = "| | parameters, M | released | GMAC | released | |"
MEASURING = """ONNX Runtime on {cores} CPU cores ({machine}), shared, one thread, one image, random weights; engines are
called in turn, {runs} times each. Medians of the times, and of the images in a second after / before with p10 … p90 of
the pairs. The paper has +19 % for T on an A100 at batch 1,024."""
MEASURED = "| | Φ | ms | throughput |"
