"""Film strips hold every frame, losslessly and in order."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from optpass.report.animation import SHOWN, png, reel
from optpass.report.clips import Clips


def decoded(source: str) -> Tensor:
    """[channels, height, width] in bytes."""
    assert source.startswith("data:image/png;base64,")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_holds_all_frames_in_order(channels: int) -> None:
    frames = torch.rand(5, channels, 6, 9)
    strip = decoded(png(frames, (6, 9)))
    assert strip.shape == (channels, 6, 5 * 9)
    for index, frame in enumerate(frames):
        assert torch.equal(strip[:, :, index * 9 : (index + 1) * 9], (frame * 255).round().byte())


def test_every_sample_has_original_optimised_and_difference(make_clips: Callable[..., Clips]) -> None:
    clips = make_clips(3, 8)
    made = reel(clips)
    assert made.frames == 8
    assert made.pixelated
    assert (made.width, made.height) == (96, 96)
    for index, sample in enumerate(made.samples):
        before, after, difference = (decoded(strip.source) for strip in sample.strips)
        assert before.shape == after.shape == difference.shape == (1, 32, 8 * 32)
        assert clips.before is not None
        gap = (clips.after[index] - clips.before[index]).abs() * made.gain
        assert torch.equal(difference, torch.cat(list(gap), dim=-1).mul(255).round().byte())


def test_the_gain_shows_the_difference_without_clipping(make_clips: Callable[..., Clips]) -> None:
    clips = make_clips(2, 4, noise=0.001)
    made, largest = reel(clips), float((clips.after - clips.before).abs().max())  # type: ignore[operator]
    assert made.gain is not None
    assert 0.2 < made.gain * largest <= 1


def test_equal_clips_have_no_gain_and_infinite_psnr(make_clips: Callable[..., Clips]) -> None:
    made = reel(make_clips(1, 4, noise=0.0))
    assert made.gain is None
    assert made.samples[0].psnr == math.inf
    assert made.samples[0].psnr_text == "∞ dB (identical)"


def test_psnr_of_a_known_difference() -> None:
    before = torch.full((1, 2, 1, 4, 4), 0.5)
    assert reel(Clips(("x",), before + 0.1, before)).samples[0].psnr == pytest.approx(20.0, abs=1e-4)


def test_large_frames_are_reduced_and_keep_their_shape() -> None:
    made = reel(Clips(("x",), torch.rand(1, 2, 3, 640, 1280)))
    assert (made.width, made.height, made.pixelated) == (320, 160, False)
    assert decoded(made.samples[0].strips[0].source).shape == (3, 160, 2 * 320)


def test_values_out_of_range_are_clamped() -> None:
    frames = torch.tensor([-1.0, 2.0, math.nan, 1.0]).reshape(1, 1, 2, 2)
    assert decoded(png(frames, (2, 2))).flatten().tolist() == [0, 255, 0, 255]


def test_many_samples_are_cut_and_counted() -> None:
    made = reel(Clips((), torch.rand(SHOWN + 5, 1, 1, 4, 4)))
    assert (len(made.samples), made.total) == (SHOWN, SHOWN + 5)


def test_clips_refuse_what_does_not_fit() -> None:
    after = torch.rand(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="differ in shape"):
        Clips(("a", "b"), after, after[:, :2])
    with pytest.raises(ValueError, match="1 labels for 2 clips"):
        Clips(("a",), after)
    with pytest.raises(ValueError, match="1 or 3"):
        Clips(("a",), torch.rand(1, 3, 2, 4, 4))
