"""``optpass run``: samples from a bundle's pipeline, or one call of its engine on given tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.runtime.bundle import read_manifest
from optpass.runtime.loading import load
from optpass.runtime.sampling import GUIDANCE, generate


def sample(
    bundle: Path,
    out: Path | None,
    *,
    samples: int,
    labels: list[int] | None = None,
    steps: int = 20,
    guidance: float = GUIDANCE,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> dict[str, Any]:
    """Generate ``samples`` clips with the bundle's own components; written to ``out`` as ``samples.npz`` and WebP.

    Raises:
        UserError: the bundle carries no pipeline that can be driven, or ``out`` exists.
    """
    _check_out(out, force)
    manifest = read_manifest(bundle)
    if manifest.components is None:
        names = ", ".join(f"{name}=FILE.npy" for name in (spec.name for spec in load(bundle).inputs))
        raise UserError(f"{bundle} carries no pipeline to sample with; call its engine with --input {names}")
    module = load(bundle)
    start = time.perf_counter()
    made = generate(
        bundle / manifest.components,
        module,
        samples=samples,
        steps=steps,
        guidance=guidance,
        seed=seed,
        labels=labels,
        progress=lambda fraction: progress("samples", fraction),
    )
    seconds = time.perf_counter() - start
    facts: dict[str, Any] = {
        "samples": samples,
        "labels": made.labels.tolist(),
        "seconds_per_sample": round(seconds / samples, 4),
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
    }
    if (bundle / manifest.components / "evaluator").is_dir():
        from optpass.evaluate.quality import Evaluator

        evaluator = Evaluator.load(bundle / manifest.components / "evaluator")
        facts["quality"] = evaluator.measure(made.frames, made.labels).as_dict()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / "samples.npz", frames=made.frames.numpy(), labels=made.labels.numpy())
        for index, (clip, label) in enumerate(zip(made.frames, made.labels, strict=True)):
            write_animation(clip, out / f"clip-{index:03d}-label-{int(label)}.webp")
        facts["written"] = str(out)
    return facts


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
    from PIL import Image

    pixels = (clip.clamp(0, 1) * 255).round().to(torch.uint8).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    frames = [
        Image.fromarray(frame[0].numpy() if len(frame) == 1 else frame.permute(1, 2, 0).numpy()) for frame in pixels
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, lossless=True)


def _check_out(out: Path | None, force: bool) -> None:
    if out is not None and out.exists() and any(out.iterdir()) and not force:
        raise UserError(f"{out} exists and is not empty; choose another folder or pass --force")


def _read_tensor(name: str, path: str) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--input {name}={path}: not a readable .npy file: {error}") from None
