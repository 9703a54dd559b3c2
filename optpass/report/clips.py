"""The sample clips that a report shows side by side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clips:
    """Samples of the original and of what came out, at equal seeds.

    ``before`` and ``after`` are float [samples, frames, channels, height, width] in [0, 1], with 1 or
    3 channels; an image is a clip of one frame. ``labels`` says what each sample was asked to show,
    ``captions`` (optional) adds a line under each.

    Raises:
        ValueError: shapes, labels and captions do not fit one another.
    """

    labels: tuple[str, ...]
    after: Tensor
    before: Tensor | None = None
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.after.ndim != 5 or self.after.shape[2] not in (1, 3):
            raise ValueError(f"clips are [samples, frames, 1 or 3, height, width], got {tuple(self.after.shape)}")
        if self.before is not None and self.before.shape != self.after.shape:
            raise ValueError(f"clips differ in shape: {tuple(self.before.shape)} and {tuple(self.after.shape)}")
        for name, texts in (("labels", self.labels), ("captions", self.captions)):
            if texts and len(texts) != len(self.after):
                raise ValueError(f"{len(texts)} {name} for {len(self.after)} clips")

    @property
    def frames(self) -> int:
        """Frames of every clip."""
        return int(self.after.shape[1])
