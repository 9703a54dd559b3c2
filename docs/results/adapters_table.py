"""The figures of adapters in engines: one LoRA merged, kept and refitted; the time of a refit beside a rebuild."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from optpass.evaluate.quality import Evaluator, psnr
from optpass.ir.hashing import file_digest
from optpass.runtime.class_to_video import ClassToVideoPipeline
from optpass.runtime.loading import load

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "checkpoints" / "moving-digits"
ADAPTER = ROOT / "tests" / "checkpoints" / "moving-digits-falling"
sys.path.append(str(ADAPTER))
LABELS = torch.arange(10)
RUNS = 3
BUILD = ("--verify", "never", "--no-baseline", "--samples", "0", "--force")

Command = Callable[..., Any]


class Timed(NamedTuple):
    """Seconds of a command as a whole, and inside of it, once Python and its packages are there."""

    wall: float
    inside: float


def adapters(optpass: Command) -> str:
    """One adapter in three kinds of bundles, and how long it takes to exchange it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for mode in ("merge", "keep", "refit"):
            _build(optpass, place, mode, 1.0)
        exchange = _exchange(optpass, place)
        clips = {name: _clips(place / name) for name in ("merge", "keep", "refit", "refitted")}
        optpass("refit", str(place / "refitted"), "--base")
        clips |= {"without": _clips(place / "refitted"), "captured": _clips(None)}
        times = _times(*_timings(optpass, place))
    return "\n".join([*_clip_table(clips), "", exchange, "", *times])


def _exchange(optpass: Command, place: Path) -> str:
    """A bundle without the adapter gets it; what that wrote, and whether it is what a rebuild writes."""
    _build(optpass, place, "refit", 0.0, name="refitted")
    before = _contents(place / "refitted")
    record = optpass("refit", str(place / "refitted"), str(ADAPTER)).record
    after, rebuilt = _contents(place / "refitted"), _contents(place / "refit")
    changed = ", ".join(f"`{name}`" for name in sorted(after) if after[name] != before[name])
    same = all(after[name] == rebuilt[name] for name in after if ".onnx" in name)
    return (
        f"`optpass refit` wrote {record['tensors']} tensors, {record['bytes'] / 1e6:.2f} MB; "
        f"files that changed: {changed}. "
        f"Engine and weights {'are' if same else 'ARE NOT'} those of a rebuild to the byte."
    )


def _build(optpass: Command, folder: Path, mode: str, scale: float, name: str = "") -> Timed:
    recipe = folder / f"{name or mode}.yaml"
    merging = {"adapter": str(ADAPTER), "mode": mode, "scale": scale}
    recipe.write_text(yaml.safe_dump({"passes": [{"merge-lora": merging}], "target": "onnxruntime"}))
    run = optpass("apply", str(recipe), str(CHECKPOINT), "-o", str(folder / (name or mode)), *BUILD)
    return Timed(run.seconds, run.record["seconds"])


def _timings(optpass: Command, folder: Path) -> tuple[list[Timed], list[Timed]]:
    """Rebuilds and refits in turn."""
    rebuilt, refitted = [], []
    for _ in range(RUNS):
        rebuilt.append(_build(optpass, folder, "refit", 1.0))
        run = optpass("refit", str(folder / "refitted"), str(ADAPTER))
        refitted.append(Timed(run.seconds, run.record["seconds"]))
    return rebuilt, refitted


def _clips(bundle: Path | None) -> Tensor:
    unet = load(bundle) if bundle is not None else None
    pipeline = ClassToVideoPipeline.load(CHECKPOINT, unet=unet)
    # The engines take one clip, with and without its class.
    return torch.cat([pipeline([label], seed=label).frames for label in LABELS.tolist()])


def _contents(bundle: Path) -> dict[str, str]:
    return {path.relative_to(bundle).as_posix(): file_digest(path) for path in bundle.rglob("*") if path.is_file()}


def _clip_table(clips: dict[str, Tensor]) -> list[str]:
    from train import DOWNWARD, downward

    evaluator = Evaluator.load(CHECKPOINT)
    titles = {
        "captured": "the model by PyTorch, no adapter",
        "without": "`optpass refit --base`",
        "merge": "`mode: merge`",
        "keep": "`mode: keep`",
        "refit": "`mode: refit`",
        "refitted": "built at scale 0, then `optpass refit`",
    }
    lines = [
        "# Adapters in engines: moving-digits learns to fall",
        "",
        f"{len(LABELS)} clips of 20 steps at equal seeds; the adapter is `tests/checkpoints/moving-digits-falling`.",
        "",
        "| engine | PSNR to `mode: merge` | PSNR to no adapter | clips that fall | frames read right |",
        "|---|---|---|---|---|",
    ]
    for name, title in titles.items():
        falling = int((downward(clips[name]) > DOWNWARD).sum())
        accuracy = evaluator.measure(clips[name], LABELS).frame_accuracy
        pair = [_decibel(clips[name], clips[other]) for other in ("merge", "captured")]
        lines.append(f"| {title} | {pair[0]} | {pair[1]} | {falling} | {accuracy:.2f} |")
    return lines


def _decibel(left: Tensor, right: Tensor) -> str:
    found = psnr(left, right)
    return "identical" if torch.equal(left, right) else f"{found:.1f} dB"


def _times(rebuilt: list[Timed], refitted: list[Timed]) -> list[str]:
    lines = [
        f"Median (least … most) of {RUNS} runs, alternating; a rebuild without verification, evidence and samples.",
        "",
        "| seconds | `optpass apply` | `optpass refit` | ratio |",
        "|---|---|---|---|",
    ]
    for title, part in (("the command, Python's start included", "wall"), ("inside the command", "inside")):
        pair = [[getattr(item, part) for item in items] for items in (rebuilt, refitted)]
        cells = [f"{median(each):.3g} ({min(each):.3g} … {max(each):.3g})" for each in pair]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {median(pair[0]) / median(pair[1]):.1f} |")
    return lines
