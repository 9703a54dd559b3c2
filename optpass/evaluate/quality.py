"""Quality metrics of generated video: does the object read right and stay itself, is the set like the real one.

- **Frame accuracy**: the share of frames in which the checkpoint's own evaluator, a classifier that was trained
  independently on real data, reads the label that was asked for.
- **Temporal consistency**: smoothness of the object's track times constancy of its shape; :func:`temporal_consistency`.
- **Fréchet distance** between the evaluator's features of generated and of real frames; :func:`frechet_distance`.
- **PSNR** between two sets of videos, as a rule before and after optimisation at equal seeds; :func:`psnr`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.errors import UserError

REFERENCE_CONFIG = "reference.json"
REFERENCE_TENSORS = "reference.safetensors"
BACKGROUND = 0.1
"""Brightness that a pixel must exceed to count as the object."""


@dataclass(frozen=True)
class Quality:
    """What :meth:`Evaluator.measure` found; higher is better except for ``frechet_distance``.

    Attributes:
        frame_accuracy: share of frames read as their label, 0 to 1.
        temporal_consistency: mean over clips, 0 to 1; to be read beside ``temporal_consistency_real``.
        temporal_consistency_real: the same figure of real clips, from the evaluator's folder.
        frechet_distance: squared units of the evaluator's features; biased upwards for small sets, so compare
            sets of one size only.
    """

    frame_accuracy: float
    temporal_consistency: float
    temporal_consistency_real: float
    frechet_distance: float

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class Reading:
    """The evaluator's view of N clips of F frames: labels [N, F] and pooled features [N, F, D]."""

    labels: Tensor
    features: Tensor


class Evaluator:
    """A classifier trained on real data, with statistics of real clips, loaded from a checkpoint's ``evaluator/``.

    The folder is an ordinary transformers image-classification folder (``config.json``, ``model.safetensors``,
    ``preprocessor_config.json``) with two files more: ``reference.safetensors`` (``mean`` [D] and ``covariance`` [D, D]
    of the pooled features of real frames) and ``reference.json`` (``temporal_consistency_real``).
    """

    def __init__(
        self, classifier: Any, *, mean: Tensor, covariance: Tensor, consistency: float, pixels: tuple[float, float]
    ) -> None:
        self._classifier = classifier
        self._mean, self._covariance, self._consistency, self._pixels = mean, covariance, consistency, pixels

    @classmethod
    def load(cls, folder: Path | str) -> Evaluator:
        """Reads an ``evaluator/`` folder, or a checkpoint folder that has one; safetensors and JSON only.

        Raises:
            UserError: there is no evaluator, or a file of it is missing or damaged.
        """
        place = Path(folder)
        if (place / "evaluator").is_dir():
            place = place / "evaluator"
        missing = [name for name in _FILES if not (place / name).is_file()]
        if missing:
            raise UserError(
                f"no evaluator in {place}: {', '.join(missing)} missing. Quality metrics need a checkpoint with an "
                "evaluator/ folder; numeric metrics work without one"
            )
        try:
            return cls._read(place)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"the evaluator in {place} cannot be read: {error}") from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise UserError(f"the evaluator in {place} has a damaged safetensors file: {error}") from error

    @classmethod
    def _read(cls, place: Path) -> Evaluator:
        from safetensors.torch import load_file

        reference = json.loads((place / REFERENCE_CONFIG).read_text("utf-8"))
        tensors = load_file(place / REFERENCE_TENSORS)
        pixels = json.loads((place / "preprocessor_config.json").read_text("utf-8"))
        return cls(
            load_classifier(place),
            mean=tensors["mean"].double(),
            covariance=tensors["covariance"].double(),
            consistency=float(reference["temporal_consistency_real"]),
            pixels=(float(pixels["image_mean"][0]), float(pixels["image_std"][0])),
        )

    def measure(self, frames: Tensor, labels: Tensor) -> Quality:
        """The quality of clips ``frames`` [N, F, C, H, W] in [0, 1] that should show ``labels`` [N].

        Raises:
            UserError: the shapes do not fit, there are fewer than two frames in all, or a value is NaN or Inf.
        """
        _check_clips(frames)
        if labels.shape != frames.shape[:1]:
            raise UserError(f"{len(frames)} clips need labels of shape [{len(frames)}], not {list(labels.shape)}")
        reading = self.read(frames)
        mean, covariance = feature_statistics(reading.features)
        return Quality(
            frame_accuracy=(reading.labels == labels[:, None]).float().mean().item(),
            temporal_consistency=temporal_consistency(frames).mean().item(),
            temporal_consistency_real=self._consistency,
            frechet_distance=frechet_distance(mean, covariance, self._mean, self._covariance),
        )

    def read(self, frames: Tensor) -> Reading:
        """What the classifier sees in each frame of ``frames`` [N, F, C, H, W] in [0, 1]."""
        mean, std = self._pixels
        labels, features = classify(self._classifier, (frames.flatten(0, 1).float() - mean) / std)
        clips = frames.shape[:2]
        return Reading(labels.reshape(clips), features.reshape(*clips, -1))


_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", REFERENCE_CONFIG, REFERENCE_TENSORS)


def load_classifier(folder: Path) -> Any:
    """The transformers image classifier in ``folder``, in float32, in evaluation mode."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


@torch.no_grad()
def classify(classifier: Any, pixels: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Labels [M] and pooled features [M, D] that ``classifier`` gives to normalised images [M, C, H, W]."""
    labels, features = [], []
    for part in torch.split(pixels, batch):
        pooled = classifier.base_model(pixel_values=part).pooler_output
        labels.append(classifier.classifier(pooled).argmax(-1))
        features.append(pooled.flatten(1))
    return torch.cat(labels), torch.cat(features)


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [..., D], in float64."""
    rows = features.flatten(0, -2).double()
    return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """‖μₐ − μᵦ‖² + tr(Σₐ + Σᵦ − 2·(Σₐ·Σᵦ)^½), the squared Fréchet distance of two Gaussians.

    The trace of the root comes from the eigenvalues of the symmetric Σₐ^½·Σᵦ·Σₐ^½, which has the same ones, so a
    rank-deficient covariance (few samples) needs no care. Source: Heusel et al. 2017; Dowson & Landau 1982.

    Args:
        mean_a: [D].
        covariance_a: [D, D], symmetric, positive semi-definite.
        mean_b: [D].
        covariance_b: [D, D], as ``covariance_a``.
    """
    a, b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + a.trace() + b.trace() - 2 * cross))


def temporal_consistency(frames: Tensor) -> Tensor:
    """How much each clip of [N, F, C, H, W] in [0, 1] shows one bright object on its way, [N], 0 to 1.

    With brightness above 0.1 as mass, c_f the centroid of frame f in pixels, and v_f = c_{f+1} − c_f:

        smoothness  = exp(−mean_f Σ_axis | |v_{f+1}| − |v_f| |)       1 for constant speed, also when reflected
        shape       = mean over frame pairs f < g of cos(x_f, x_g)    x: frame with its centroid moved to the middle
        consistency = smoothness · shape

    A reflection in mid-frame does cost something, so real clips are below 1: read the figure beside that of real clips.
    A frame without an object has shape similarity 0 to every other. Clips of fewer than three frames have smoothness 1.

    Raises:
        UserError: ``frames`` is not five-dimensional, or holds NaN or Inf.
    """
    _check_clips(frames)
    mass = (frames.float().mean(2) - BACKGROUND).clamp(min=0)
    track = centroids(mass)
    speed = track.diff(dim=1).abs()
    changes = speed.diff(dim=1).abs().sum(-1)
    smoothness = torch.exp(-changes.mean(1)) if changes.shape[1] else torch.ones(len(frames))
    return smoothness * _shape_similarity(mass, track)


def centroids(mass: Tensor) -> Tensor:
    """Centroids (x, y) in pixels [N, F, 2] of mass [N, F, H, W]; the middle where there is none."""
    height, width = mass.shape[-2:]
    total = mass.sum((-2, -1))
    x = (mass.sum(-2) * torch.arange(width)).sum(-1)
    y = (mass.sum(-1) * torch.arange(height)).sum(-1)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    found = torch.stack([x, y], dim=-1) / total.clamp(min=1e-6)[..., None]
    return torch.where(total[..., None] > 1e-6, found, middle)


def _shape_similarity(mass: Tensor, track: Tensor) -> Tensor:
    """Mean cosine [N] over all pairs of frames of [N, F, H, W], each Fourier-shifted from `track` to the middle."""
    height, width = mass.shape[-2:]
    frames = mass.shape[1]
    shift = torch.tensor([(width - 1) / 2, (height - 1) / 2]) - track
    phase_x = torch.fft.rfftfreq(width) * shift[..., 0:1]
    phase_y = torch.fft.fftfreq(height) * shift[..., 1:2]
    phase = -2 * math.pi * (phase_y[..., :, None] + phase_x[..., None, :])
    moved = torch.fft.irfft2(torch.fft.rfft2(mass) * torch.polar(torch.ones_like(phase), phase), s=(height, width))
    flat = moved.flatten(2)
    unit = flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    cosines = (unit @ unit.transpose(1, 2)).clamp(0, 1)
    pairs = frames * (frames - 1) / 2
    return cosines.triu(diagonal=1).sum((1, 2)) / pairs if pairs else torch.ones(len(mass))


def psnr(a: Tensor, b: Tensor) -> float:
    """10·log₁₀(1 / mean((a − b)²)) in dB over all values of two sets of videos in [0, 1]; infinite if equal.

    Raises:
        UserError: the shapes differ.
    """
    if a.shape != b.shape:
        raise UserError(f"PSNR needs two sets of one shape, not {list(a.shape)} and {list(b.shape)}")
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def _check_clips(frames: Tensor) -> None:
    if frames.ndim != 5 or frames.shape[0] * frames.shape[1] < 2:
        raise UserError(f"clips have shape [N, F, C, H, W] with two frames or more, not {list(frames.shape)}")
    if not torch.isfinite(frames).all():
        raise UserError("the frames hold NaN or Inf: what generated them is broken")
