"""``optpass run``: samples from a bundle's pipeline, or one call of its engine on given tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.runtime.bundle import read_manifest
from optpass.runtime.loading import load, load_pipeline
from optpass.runtime.looped import LoopModule
from optpass.runtime.sampling import Asked, Samples, drive, takes_labels, usual_guidance

SMALL = 256
"""Width in pixels below which clips are enlarged to be seen."""


def sample(
    bundle: Path,
    out: Path | None,
    *,
    samples: int,
    asked: Asked,
    image: Path | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> dict[str, Any]:
    """Generate ``samples`` clips or images with the bundle's own pipeline.

    They are written to ``out``: all as ``samples.npz``, clips as WebP, images as PNG. ``image`` is a file
    for pipelines that start from one. What the recipe said of the pipeline's call holds here too.

    Raises:
        UserError: the bundle carries no pipeline that can be driven, its call needs something else, or ``out`` exists.
    """
    _check_out(out, force)
    manifest = read_manifest(bundle)
    if manifest.components is None:
        names = ", ".join(f"{name}=FILE.npy" for name in (spec.name for spec in load(bundle).inputs))
        raise UserError(f"{bundle} carries no pipeline to sample with; call its engine with --input {names}")
    asked = replace(
        asked,
        steps=asked.steps or manifest.usual_steps,
        guidance=usual_guidance(manifest.driven(), None) if asked.guidance is None else asked.guidance,
        call={**manifest.call, **asked.call},
        image=_read_image(image) if image else None,
    )
    pipeline = load_pipeline(bundle)
    start = time.perf_counter()
    made = drive(
        pipeline, samples=samples, asked=asked, seed=seed, progress=lambda fraction: progress("samples", fraction)
    )
    seconds = time.perf_counter() - start
    facts: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "samples": samples,
        "labels": made.labels.tolist(),
        "seconds_per_sample": round(seconds / samples, 4),
        "steps": asked.steps,
        "guidance": asked.guidance,
        "seed": seed,
    }
    calls = {name: module.statistics for name, module in pipeline.components.items() if isinstance(module, LoopModule)}
    if calls:
        facts["calls"] = calls
    if (bundle / manifest.components / "evaluator").is_dir():
        from optpass.evaluate.quality import Evaluator

        evaluator = Evaluator.load(bundle / manifest.components / "evaluator")
        facts["quality"] = evaluator.measure(made.frames, made.labels).as_dict()
    if out is not None:
        _write_samples(made, out, labelled=takes_labels(pipeline))
        facts["written"] = str(out)
    return facts


def _write_samples(made: Samples, out: Path, *, labelled: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "samples.npz", frames=made.frames.numpy(), labels=made.labels.numpy())
    for index, (clip, label) in enumerate(zip(made.frames, made.labels, strict=True)):
        name = f"{'clip' if made.moving else 'image'}-{index:03d}{f'-label-{int(label)}' if labelled else ''}"
        if made.moving:
            write_animation(clip, out / f"{name}.webp", scale=4 if clip.shape[-1] < SMALL else 1)
        else:
            _image(clip[0]).save(out / f"{name}.png")


def _image(frame: Tensor) -> Any:
    """A frame [C, H, W] in [0, 1] as a PIL image."""
    from PIL import Image

    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def _read_image(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path}: not a readable image: {error}") from None


def answer(bundle: Path, files: Mapping[str, str], out: Path | None, *, force: bool = False) -> dict[str, Any]:
    """Call the bundle's engine once on tensors from ``.npy`` files; outputs go to ``out/outputs.npz``.

    Raises:
        UserError: a file cannot be read, or the tensors are not the engine's inputs.
    """
    _check_out(out, force)
    module = load(bundle)
    tensors = module.runner(module.checked({name: _read_tensor(name, path) for name, path in files.items()}))
    facts: dict[str, Any] = {
        name: {"shape": list(value.shape), "mean": float(value.float().mean()), "std": float(value.float().std())}
        for name, value in tensors.items()
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: value.float().numpy() for name, value in tensors.items()}
        np.savez_compressed(out / "outputs.npz", **arrays)
        facts["written"] = str(out / "outputs.npz")
    return facts


def write_animation(clip: Tensor, path: Path, *, scale: int = 4, milliseconds: int = 140) -> None:
    """A clip [F, C, H, W] in [0, 1] as a looping lossless WebP, enlarged without smoothing."""
    large = clip.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    frames = [_image(frame) for frame in large]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, lossless=True)


def _check_out(out: Path | None, force: bool) -> None:
    if out is not None and out.exists() and any(out.iterdir()) and not force:
        raise UserError(f"{out} exists and is not empty; choose another folder or pass --force")


def _read_tensor(name: str, path: str) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--input {name}={path}: not a readable .npy file: {error}") from None
