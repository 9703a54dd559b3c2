"""Clips as film strips: one PNG per clip with its frames side by side, which CSS steps through.

A strip needs no script, plays every clip of the page in step, holds still for readers who ask for
less motion, and prints as what it is.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optpass.report.clips import Clips
from optpass.report.units import decibels

SHOWN = 16
SMALL_BOX, LARGE_BOX = 96, 320
GAINS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 100_000, 1_000_000)
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Strip:
    """One film strip: what it is of, and its PNG as a data URI."""

    title: str
    source: str
    description: str


@dataclass(frozen=True)
class Sample:
    """One sample's strips (original, optimised, difference) with its label and PSNR in dB."""

    label: str
    caption: str
    psnr: float | None
    strips: tuple[Strip, ...]

    @property
    def psnr_text(self) -> str:
        """Empty where there is no original to compare with."""
        return "" if self.psnr is None else decibels(self.psnr)


@dataclass(frozen=True)
class Reel:
    """The samples shown, of ``total``.

    A frame takes ``width`` × ``height`` CSS pixels at most; ``gain`` is what differences are multiplied by,
    None where there is no difference.
    """

    samples: tuple[Sample, ...]
    total: int
    frames: int
    width: int
    height: int
    pixelated: bool
    gain: int | None


def reel(clips: Clips) -> Reel:
    """The first sixteen of ``clips`` as strips; frames larger than 320 pixels are reduced to that."""
    height, width = clips.after.shape[-2:]
    box = SMALL_BOX if max(height, width) <= SMALL_BOX else LARGE_BOX
    scale = box / max(height, width)
    if scale >= 1:
        scale = float(math.floor(scale))
    shown = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = shown if scale < 1 else (height, width)
    gap = None if clips.before is None else (clips.after.float() - clips.before.float()).abs()
    gain = None if gap is None else _gain(gap)
    samples = tuple(_sample(clips, index, gap, gain, pixels) for index in range(min(SHOWN, len(clips.after))))
    return Reel(samples, len(clips.after), clips.frames, shown[1], shown[0], scale > 1, gain)


def png(frames: Tensor, size: tuple[int, int]) -> str:
    """Frames [frames, channels, height, width] in [0, 1], side by side, as a data URI of a lossless PNG."""
    from PIL import Image

    frames = torch.nan_to_num(frames.float()).clamp(0, 1)
    if size != tuple(frames.shape[-2:]):
        frames = torch.nn.functional.interpolate(frames, size=size, mode="area")
    strip = torch.cat(list(frames), dim=-1).mul(255).round().byte().permute(1, 2, 0)
    pixels: Pixels = strip.cpu().numpy()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _sample(clips: Clips, index: int, gap: Tensor | None, gain: int | None, size: tuple[int, int]) -> Sample:
    label = clips.labels[index] if clips.labels else str(index + 1)
    caption = clips.captions[index] if clips.captions else ""
    what = f"sample {label}, {clips.frames} frame{'s' if clips.frames > 1 else ''}"
    after = Strip("optimised", png(clips.after[index], size), f"{what}, made with the optimised model")
    if clips.before is None or gap is None:
        return Sample(label, caption, None, (after,))
    from optpass.evaluate.quality import psnr

    ratio = psnr(clips.before[index], clips.after[index])
    before = Strip("original", png(clips.before[index], size), f"{what}, made with the original model")
    difference = Strip(
        f"difference × {gain:,}" if gain and gain > 1 else "difference",
        png(gap[index] * (gain or 1), size),
        f"absolute difference of the two, {what}" + (f", amplified {gain:,} times" if gain else ": none"),
    )
    return Sample(label, caption, ratio, (before, after, difference))


def _gain(gap: Tensor) -> int | None:
    """The largest round factor that keeps the largest difference within the scale; None where all is equal."""
    largest = float(torch.nan_to_num(gap).max()) if gap.numel() else 0.0
    fitting = [gain for gain in GAINS if gain * largest <= 1] if largest else []
    return max(fitting) if fitting else 1 if largest else None
