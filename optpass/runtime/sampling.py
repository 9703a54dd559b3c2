"""Generate samples with a pipeline folder whose denoiser is replaced by an optimised one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.errors import UserError

GUIDANCE = 3.0


@dataclass(frozen=True)
class Samples:
    """Generated clips [N, F, C, H, W] in [0, 1] and the class label of each [N]."""

    frames: Tensor
    labels: Tensor


def can_sample(folder: Path | None) -> bool:
    """Whether :func:`generate` knows how to drive the pipeline in ``folder``."""
    return folder is not None and pipeline_class_name(folder) in SAMPLERS


def pipeline_class_name(folder: Path) -> str:
    """``_class_name`` of the folder's ``model_index.json``; empty when there is none."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    name = index.get("_class_name", "") if isinstance(index, dict) else ""
    return name if isinstance(name, str) else ""


def generate(
    folder: Path,
    denoiser: Any,
    *,
    samples: int,
    steps: int = 20,
    guidance: float = GUIDANCE,
    seed: int = 0,
    labels: list[int] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Samples:
    """``samples`` clips, the i-th from seed ``seed + i`` and label ``labels[i]`` (0, 1, 2 … in turn by default).

    Raises:
        UserError: the folder's pipeline is not one that can be driven here.
    """
    name = pipeline_class_name(folder)
    if name not in SAMPLERS:
        raise UserError(
            f"cannot generate samples with a {name or 'folder without model_index.json'}; known: "
            f"{', '.join(SAMPLERS)}. Load the engine with optpass.load(BUNDLE) and put it into your pipeline"
        )
    return SAMPLERS[name](folder, denoiser, samples, steps, guidance, seed, labels, progress)


def _class_to_video(
    folder: Path,
    denoiser: Any,
    samples: int,
    steps: int,
    guidance: float,
    seed: int,
    labels: list[int] | None,
    progress: Callable[[float], None],
) -> Samples:
    from optpass.runtime.class_to_video import ClassToVideoPipeline

    pipeline = ClassToVideoPipeline.load(folder, unet=denoiser)
    chosen = [(labels[i % len(labels)] if labels else i % 10) for i in range(samples)]
    clips = []
    for index, label in enumerate(chosen):
        # One clip a call: an engine has the batch that it was built for, two with guidance.
        result = pipeline([label], num_inference_steps=steps, guidance_scale=guidance, seeds=[seed + index])
        clips.append(torch.as_tensor(result.frames))
        progress((index + 1) / samples)
    return Samples(torch.cat(clips), torch.tensor(chosen))


SAMPLERS: dict[str, Callable[..., Samples]] = {"ClassToVideoPipeline": _class_to_video}
"""Drivers by pipeline class name."""
