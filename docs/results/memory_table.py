"""Feed-forwards sliced and memories made shorter: costs, and ONNX Runtime before and after."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from engines import timed as timed_beside
from torch import nn

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.capture.timm_import import timm_importable
from optpass.evaluate.difference import program_runner
from optpass.ir.program import Program
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import make_recipe
from optpass.testing import capture_module

DIGITS = Path(__file__).parents[2] / "tests" / "checkpoints" / "digits-vit"
TRIED: tuple[dict[str, Any], ...] = (
    *({"slice-ffn": {"fraction": part, "order": order}} for part in (0.75, 0.5) for order in ("prefix", "importance")),
    *({"pool-memory": {"match": [layers]}} for layers in ("vit.layers.[6-9]", "vit.layers.*")),
)
RUNS, WARMUP = 8, 2
FRACTIONS = (0.5, 0.25, 0.125)
SIDE, FRAMES, POINTERS = 32, 7, 64
"""SAM 2's memory at 512×512: rows of the grid, frames, and rows of the pointers to objects."""
VIDEO, TOKENS, LENGTHS = 40, 257, (20, 10)
"""Frames of a video, rows of each as ViT-g/14 gives them, and lengths of the bank."""


def memory() -> str:
    """The page."""
    rows = [*_slices(), *_pooled(), *_banks()]
    note = MEASURING.format(cores=os.cpu_count(), machine=platform.machine(), runs=RUNS)
    timed = "\n".join([TABLE, "|---|---|---|---|---|---|", *rows])
    return "\n\n".join([HEAD, note, timed, DIGITS_NOTE, "\n".join([DIGITS_TABLE, "|---|---|---|", *_digits()])])


def _digits() -> Iterator[str]:
    """Of the trained digits-vit, without healing."""
    path = DIGITS / "train.py"
    spec: Any = importlib.util.spec_from_file_location("digits_vit_train", path)
    train = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = train
    spec.loader.exec_module(train)
    scans, labels = train.digits("held-out")
    images = {"pixel_values": train.render(scans)}
    program = capture(DIGITS, inputs={"pixel_values": (len(scans), 1, 32, 32)}, dtype=torch.float32)
    program, _ = run_passes(program, make_recipe({"passes": ["simplify"]}).steps)
    for name, passes in ({"as it is": []} | {str(each): [each] for each in TRIED}).items():
        after, _ = run_passes(program, make_recipe({"passes": passes, "unhealed": True}).steps)
        found = program_runner(after, "full")(images)["logits"].argmax(-1)
        accuracy = 100 * (found == labels).float().mean().item()
        macs = measure(after).totals.macs / measure(program).totals.macs
        yield f"| {_said(name)} | {100 * (macs - 1):+.1f} % | {accuracy:.1f} % |"


def _said(options: str) -> str:
    return options if "{" not in options else f"`{options[1:-1].replace(chr(39), '')}`"


def _slices() -> Iterator[str]:
    with timm_importable():
        import timm
    program, _ = capture_module(lambda: timm.create_model("vit_base_patch16_224"), x=torch.zeros(1, 3, 224, 224))
    for fraction in FRACTIONS:
        yield _row("ViT-B/16, 224×224", program, "slice-ffn", {"fraction": fraction})


def _pooled() -> Iterator[str]:
    keys = FRAMES * SIDE**2 + POINTERS
    shapes = {"features": (SIDE**2, 1, 256), "memory": (keys, 1, 64), "positions": (keys, 1, 64)}
    program, _ = capture_module(_tracker, **{name: torch.zeros(shape) for name, shape in shapes.items()})
    options = {"match": ["*.cross_attn_image"], "grid": [SIDE, SIDE], "unpooled": POINTERS}
    yield _row(f"SAM 2's memory attention, {FRAMES} frames of {SIDE}×{SIDE}", program, "pool-memory", options)


def _tracker() -> nn.Module:
    from transformers import Sam2VideoConfig
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryAttention

    class Tracker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = Sam2VideoConfig(memory_attention_rope_feat_sizes=[SIDE, SIDE])
            config._attn_implementation = "sdpa"
            self.memory = Sam2VideoMemoryAttention(config)

        def forward(self, features: torch.Tensor, memory: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.memory(features, memory, None, positions, POINTERS)
            return found

    return Tracker()


def _banks() -> Iterator[str]:
    program, _ = capture_module(_qformer, features=torch.zeros(1, VIDEO, TOKENS, 1408))
    program, _ = run_passes(program, make_recipe({"passes": ["simplify"]}).steps)
    for length in LENGTHS:
        options = {"match": ["*.crossattention.*"], "length": length, "frames": VIDEO}
        yield _row(f"four layers of BLIP-2's Q-Former, {VIDEO} frames of {TOKENS}", program, "bank-memory", options)


def _qformer() -> nn.Module:
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qformer = Blip2QFormerModel(Blip2QFormerConfig(num_hidden_layers=4))
            self.queries = nn.Parameter(torch.zeros(1, 32, 768))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            options = {"encoder_hidden_states": features.flatten(1, 2), "return_dict": False}
            found: torch.Tensor = self.qformer(query_embeds=self.queries, **options)[0]
            return found

    return Reader()


def _row(name: str, program: Program, applied: str, options: Mapping[str, Any]) -> str:
    after, _ = run_passes(program, make_recipe({"passes": [{applied: {**options}}], "unhealed": True}).steps)
    costs = [measure(each).totals for each in (program, after)]
    timed = timed_beside(program, after, runs=RUNS, warmup=WARMUP)
    said = ", ".join(f"{key}: {value}" for key, value in options.items() if key in ("fraction", "length"))
    cells = [
        name,
        f"`{applied}`" if not said else f"`{applied}: {{{said}}}`",
        " → ".join(f"{each.parameters / 1e6:.1f}" for each in costs),
        " → ".join(f"{each.macs / 1e9:.2f}" for each in costs),
        f"{timed.before.median:.0f} → {timed.after.median:.0f}",
        f"{timed.ratio.median:.2f} ({timed.ratio.p10:.2f} … {timed.ratio.p90:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """# MatFormer's slices, EfficientTAM's pooled memory, MA-LMM's bank

`slice-ffn` on a vision transformer, `pool-memory` on the memory attention of SAM 2 (four layers, 64 rows of pointers),
`bank-memory` on a Q-Former that sees a whole video. Random weights."""
MEASURING = """ONNX Runtime on {cores} CPU cores ({machine}), shared, one thread, batch 1; engines are called in turn,
{runs} times each. Medians, and the ratio of the times, after / before, with p10 … p90 of the pairs."""
TABLE = "| | pass | parameters, M | GMAC | ms | ratio |"
DIGITS_NOTE = """The trained checkpoint digits-vit (12 layers, 8×8 tokens and a class token) on its 360 held-out digits,
without any healing. It is no MatFormer: of its units the first are any, and `order: importance` sorts them."""
DIGITS_TABLE = "| | MACs | read right |"
