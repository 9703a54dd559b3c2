"""MobileVD's ladder on moving-digits, healed rung by rung: what each rung costs, how good it is, how long it takes.

python tests/benchmarks/mobilevd_digits.py --out docs/results/mobilevd-digits.md

Every rung is a bundle of its own, sampled as it is made for. All generate clips of the same labels and seeds; the
folder's evaluator reads them. Times are of whole clips in ONNX Runtime, pipeline included, in turn within rounds. What
is trained is trained once and kept (`optpass` resumes and reuses trainings); the page says how long each took.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import optpass
from optpass.evaluate.quality import Evaluator
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import Recipe, find_recipe, load_recipe
from optpass.pipeline.records import machine_text
from optpass.pipeline.request import Request
from optpass.runtime.bundle import read_manifest
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked, drive

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "moving-digits"
GUIDANCE = 3.0
FEWER, POINTS, FRECHET = 50.0, 0.05, 1.25
"""FLOP of a clip have to be so many times fewer; digits read right may fall so much; Fréchet grow to so many times."""
PAPER = {
    "captured": (50, "45.43 (1024×576), 8.60", 140),
    "single-token-attention": (50, "8.24", 194),
    "multiscale-time": (1, "5.42", 139),
    "prune-blocks": (1, "4.64", 127),
    "funnel-channels": (1, "4.34", 149),
}
"""Evaluations, TFLOP of one and FVD at 25 fps of MobileVD, arXiv 2412.07583, Table 1; there the step comes first."""


@dataclass
class Rung:
    """The model after some of the recipe's passes: what a clip takes, its quality, its time over the first one's."""

    name: str
    evaluations: int
    gflop: float
    pipeline: Any
    asked: Asked
    quality: dict[str, float]
    seconds: float = 0.0
    training: float | None = None
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--recipe", default="mobilevd-digits")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        rungs = list(climbed(load_recipe(find_recipe(options.recipe)), Path(temporary), options.clips))
        timed(rungs, options.rounds)
    broken = list(failures(rungs))
    options.out.write_text(page(rungs, broken, load, options), encoding="utf-8")
    if broken:
        raise SystemExit("\n".join(broken))


def climbed(recipe: Recipe, folder: Path, clips: int) -> Iterator[Rung]:
    """The rungs: after every pass that changes the model, with the training behind it."""
    evaluator = Evaluator.load(CHECKPOINT / "evaluator")
    beside = decoder_gflop()
    for end in ends(recipe):
        out = folder / str(end)
        made = apply(
            replace(recipe, steps=recipe.steps[:end]), Request(str(CHECKPOINT), out, verify="never", baseline=False)
        )
        sample = made.report["ladder"][-1]
        name = next(step.name for step in reversed(recipe.steps[:end]) if step.name != "distill")
        asked = Asked(steps=read_manifest(out).usual_steps, guidance=GUIDANCE)
        pipeline = build_pipeline(CHECKPOINT, {"unet": optpass.load(out)})
        frames = drive(pipeline, samples=clips, asked=asked, seed=0)
        quality = evaluator.measure(frames.frames, frames.labels).as_dict()
        gflop = sample["evaluations"] * 2 * sample["macs"] / 1e9 + beside
        found = Rung("captured" if name == "steps" else name, sample["evaluations"], gflop, pipeline, asked, quality)
        last = made.report["passes"][-1].get("training") or {}
        yield replace(found, training=last.get("seconds"))
        print(found.name, found.evaluations, round(gflop, 3), quality, flush=True)


def ends(recipe: Recipe) -> Iterator[int]:
    """Numbers of passes after which the model is a rung: not between a pass and the training that heals it."""
    for end in range(1, len(recipe.steps) + 1):
        if end == len(recipe.steps) or recipe.steps[end].name != "distill":
            yield end


def decoder_gflop() -> float:
    """2·MAC of decoding the eight frames of a clip, as PyTorch counts it."""
    pipeline = build_pipeline(CHECKPOINT, {})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.vae.decode(torch.zeros(8, 4, 16, 16))
    return float(counter.get_total_flops()) / 1e9


def timed(rungs: list[Rung], rounds: int) -> None:
    """Seconds of a clip, and their ratio to the first rung's within each round."""
    times = [[_seconds(rung, number) for rung in rungs] for number in range(rounds + 1)][1:]
    for index, rung in enumerate(rungs):
        ratios = [line[index] / line[0] for line in times]
        tenths = quantiles(ratios, n=10, method="inclusive")
        rung.ratio = median(ratios), tenths[0], tenths[-1]
        rung.seconds = median(line[index] for line in times)


def _seconds(rung: Rung, seed: int) -> float:
    started = time.perf_counter()
    drive(rung.pipeline, samples=1, asked=rung.asked, seed=seed)
    return time.perf_counter() - started


def failures(rungs: list[Rung]) -> Iterator[str]:
    """What the last rung does not hold of what is promised, beside the first one."""
    first, last = rungs[0], rungs[-1]
    if first.gflop / last.gflop < FEWER:
        yield f"{first.gflop / last.gflop:.1f} times fewer FLOP a clip, and not {FEWER:g}"
    if (lost := first.quality["frame_accuracy"] - last.quality["frame_accuracy"]) > POINTS:
        yield f"digits read right fall by {100 * lost:.1f} points, and not at most {100 * POINTS:g}"
    if (grown := last.quality["frechet_distance"] / first.quality["frechet_distance"]) > FRECHET:
        yield f"the Fréchet distance grows to {grown:.2f} times, and not at most {FRECHET:g}"


def table(rungs: list[Rung]) -> str:
    head = (
        "after",
        "evaluations a clip",
        "GFLOP a clip",
        "fewer",
        "digits read right",
        "Fréchet distance",
        "consistency",
        "ms a clip",
        "ratio (p10 … p90)",
        "training, min",
        "MobileVD: evaluations, TFLOP of one, FVD",
    )
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for rung in rungs:
        quality, paper = rung.quality, PAPER.get(rung.name)
        cells = (
            rung.name,
            str(rung.evaluations),
            f"{rung.gflop:.2f}",
            f"{rungs[0].gflop / rung.gflop:.1f}×",
            f"{100 * quality['frame_accuracy']:.1f} %",
            f"{quality['frechet_distance']:.3f}",
            f"{quality['temporal_consistency']:.3f}",
            f"{1000 * rung.seconds:.0f}",
            f"{rung.ratio[0]:.4f} ({rung.ratio[1]:.4f} … {rung.ratio[2]:.4f})",
            "" if rung.training is None else f"{rung.training / 60:.1f}",
            "" if paper is None else f"{paper[0]}, {paper[1]}, {paper[2]}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rungs: list[Rung], broken: list[str], load: tuple[float, ...], options: argparse.Namespace) -> str:
    verdict = "\n".join(f"- {line}" for line in broken) if broken else "It does."
    asked = f"--clips {options.clips} --rounds {options.rounds}"
    total = sum(rung.training or 0.0 for rung in rungs) / 60
    return f"""# MobileVD's ladder on moving-digits

    python tests/benchmarks/mobilevd_digits.py {asked}

{machine_text()}; load {load[0]:.1f} before and {os.getloadavg()[0]:.1f} after.
{options.clips} clips of each rung, the same labels and seeds for all, each rung sampled as it is made for: the
original in 25 steps with guidance {GUIDANCE:g} (two evaluations a step). FLOP = 2·MAC of linear, convolution, matmul
and attention, of all evaluations of a clip and of decoding its frames ({decoder_gflop():.3f} GFLOP). Times are of whole
clips, pipeline included, {options.rounds} rounds in turn.

{table(rungs)}

In the last column stands MobileVD's ladder (arXiv 2412.07583, Table 1), which distils the step first and heals at one
step; here structure is healed at many steps, where a plain distance heals, and the step is distilled last. The
trainings took {total:.0f} minutes in all where their times are known.

The last rung is to take {FEWER:g} times fewer FLOP than the first, to lose at most {100 * POINTS:g} points of digits
read right, and to have at most {FRECHET:g} times its Fréchet distance. {verdict}

<details><summary>All metrics</summary>

```json
{json.dumps({rung.name: rung.quality for rung in rungs}, indent=1)}
```

</details>
"""


if __name__ == "__main__":
    main()
