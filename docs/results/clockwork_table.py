"""Clockwork's published FLOPs beside those that the commands count, structure only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS = 8
SD15 = Path("tests/configs/sd15-unet")
EFFICIENT = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
"""The paper's Efficient UNet: no transformers at the highest resolution."""
BEFORE, AFTER = {"cut": "up_blocks.2.upsamplers.0", "at": "input"}, {"cut": "up_blocks.2", "at": "output"}


def clockwork(optpass: Callable[..., Any], root: Path) -> str:
    """The table; ``optpass`` runs the command with ``--json`` in ``root``."""
    rows = [
        f"| {name} | {published:g} | {found:.4g} | {_off(found, published)} |"
        for name, published, found in _rows(optpass, root)
    ]
    text = f"""# Clockwork on SD 1.5's configuration, structure only

GFLOP (2·MAC) of a step of the UNet at 64 × 64 latents, batch 1, and the share of {STEPS} steps, every second of which
is full. As the paper's counter does, products inside attention are left out. Published: Habibian et al., CVPR 2024,
Tables 1 and 3 and Figure 8; the count of the cut after the upsampler follows from the paper's blocks, the cut is that
of the released code. There the first level's downsampler runs in a step that reuses, and nothing reads what it makes;
here it is dead code and gone, and a second row adds it again. The paper's adaptor has about 7 more than the identity.

| | published | optpass | difference |
|---|---|---|---|
"""
    return text + "\n".join(rows)


def _off(found: float, published: float) -> str:
    return f"{100 * (found / published - 1):+.2f} %"


def _rows(optpass: Callable[..., Any], root: Path) -> Iterator[tuple[str, float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        efficient = Path(folder, "efficient")
        efficient.mkdir()
        config = json.loads((root / SD15 / "config.json").read_text("utf-8"))
        (efficient / "config.json").write_text(json.dumps({**config, **EFFICIENT}), "utf-8")
        before = _counted(optpass, str(SD15), BEFORE, Path(folder, "before"))
        after = _counted(optpass, str(SD15), AFTER, Path(folder, "after"))
        small = _counted(optpass, str(efficient), BEFORE, Path(folder, "small"))
    dead = _downsampler(optpass)
    yield "SD 1.5, full step", 677.8, before["full"]
    yield "SD 1.5, reusing step, cut before the upsampler", 228.4, before["reuse"]
    yield "the same with the downsampler", 228.4, before["reuse"] + dead
    yield "SD 1.5, reusing step, cut after the upsampler", 197.9, after["reuse"]
    yield "the same with the downsampler", 197.9, after["reuse"] + dead
    yield f"SD 1.5, {STEPS} steps, before the upsampler, share of the uncached", 0.669, before["share"]
    yield f"SD 1.5, {STEPS} steps, after the upsampler, share of the uncached", 0.646, after["share"]
    yield "Efficient UNet, full step", 593.5, small["full"]
    yield "Efficient UNet, reusing step, cut before the upsampler", 143.5, small["reuse"]
    yield "the same with the downsampler", 143.5, small["reuse"] + dead


def _counted(optpass: Callable[..., Any], checkpoint: str, cut: dict[str, str], out: Path) -> dict[str, float]:
    options = [argument for key, value in cut.items() for argument in ("--set", f"cache-features.{key}={value}")]
    arguments = ("apply", "clockwork-sd15", checkpoint, "-o", str(out), "--structure-only", "--steps", str(STEPS))
    report = optpass(*arguments, "--inputs", "sample=1x4x64x64", *options).record
    entries = {name: _flop(entry["totals"]) for name, entry in report["after"]["entries"].items()}
    return {**entries, "share": _flop(report["loop"]["after"]) / _flop(report["loop"]["before"])}


def _downsampler(optpass: Callable[..., Any]) -> float:
    """The first level's, which the other two rows of a cut differ by."""
    arguments = ("inspect", str(SD15), "--inputs", "sample=1x4x64x64", "--depth", "4")
    return _flop(optpass(*arguments).record["entries"]["full"]["by_module"]["down_blocks.0.downsamplers.0"])


def _flop(totals: dict[str, Any]) -> float:
    """In 10⁹, without the products inside attention."""
    found: float = 2 * (totals["macs"] - totals["macs_attention"]) / 1e9
    return found
