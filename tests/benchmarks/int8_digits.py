"""moving-digits in int8, alone and with Clockwork, in ONNX Runtime and OpenVINO: quality of samples and their time.

python tests/benchmarks/int8_digits.py --out docs/results/int8-digits.md

All bundles generate the same clips (labels and seeds); the folder's evaluator reads them. Times are of whole
generations, pipeline included, in turn within rounds; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import optpass
from optpass.evaluate.quality import Evaluator, psnr
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import load_recipe
from optpass.pipeline.records import machine_text
from optpass.pipeline.request import Request
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked, Samples, drive

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "moving-digits"
CLIPS, STEPS, GUIDANCE, ROUNDS, TIMED = 60, 20, 3.0, 8, 2
INT8 = {"quantize": {"samples": 2, "calls": 24, "seed": 1000, "keep": ["*.conv_shortcut", "conv_in", "conv_out"]}}
CLOCKWORK = {"cache-features": {"cut": "up_blocks.1", "every": 2}}
POINTS, FRECHET = 0.02, 1.1
"""Digits read right may fall by so much, Fréchet distances grow to so many times the float engine's."""


@dataclass
class Row:
    """One bundle: its samples beside the float one's of the same runtime, and its time over that one's."""

    runtime: str
    form: str
    samples: Samples
    pipeline: Any
    megabytes: float
    quality: dict[str, float]
    psnr: float = 0.0
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runtimes", default="onnxruntime,openvino")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        found: list[Row] = []
        for runtime in options.runtimes.split(","):
            found += measured(runtime, Path(temporary), options.clips, options.rounds)
            print(table(found), flush=True)
    broken = failures(found)
    options.out.write_text(page(found, broken, load, options), encoding="utf-8")
    if broken:
        raise SystemExit("\n".join(broken))


def measured(runtime: str, folder: Path, clips: int, rounds: int) -> list[Row]:
    evaluator = Evaluator.load(CHECKPOINT / "evaluator")
    rows = []
    for form, passes in (
        ("float", []),
        ("int8", [INT8]),
        ("Clockwork", [CLOCKWORK]),
        ("int8 + Clockwork", [CLOCKWORK, INT8]),
    ):
        out = folder / f"{runtime}-{len(rows)}"
        recipe = out.with_suffix(".json")
        sizes = {"sample": [2, 8, 4, 16, 16]}
        recipe.write_text(json.dumps({"dtype": "float32", "inputs": sizes, "passes": passes, "target": runtime}))
        apply(load_recipe(recipe), Request(str(CHECKPOINT), out, verify="never", samples=0))
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        megabytes = sum(file["bytes"] for name, file in manifest["files"].items() if "components/" not in name) / 1e6
        pipeline = build_pipeline(CHECKPOINT, {"unet": optpass.load(out)})
        asked = Asked(steps=STEPS, guidance=GUIDANCE)
        made = drive(pipeline, samples=clips, asked=asked, seed=0)
        quality = evaluator.measure(made.frames, made.labels).as_dict()
        rows.append(Row(runtime, form, made, pipeline, megabytes, quality))
        print(runtime, form, quality, flush=True)
    for row in rows:
        row.psnr = psnr(rows[0].samples.frames, row.samples.frames)
    times = [[_seconds(row.pipeline, number) for row in rows] for number in range(rounds + 1)][1:]
    for index, row in enumerate(rows):
        ratios = [line[index] / line[0] for line in times]
        tenths = quantiles(ratios, n=10, method="inclusive")
        row.ratio = median(ratios), tenths[0], tenths[-1]
    return rows


def _seconds(pipeline: Any, seed: int) -> float:
    started = time.perf_counter()
    drive(pipeline, samples=TIMED, asked=Asked(steps=STEPS, guidance=GUIDANCE), seed=seed)
    return time.perf_counter() - started


def failures(rows: list[Row]) -> list[str]:
    """Bundles in integers whose samples are worse than the bounds, beside the same without integers."""
    found = []
    for row in rows:
        if "int8" not in row.form:
            continue
        plain = "Clockwork" if "Clockwork" in row.form else "float"
        base = next(other for other in rows if (other.runtime, other.form) == (row.runtime, plain))
        lost = base.quality["frame_accuracy"] - row.quality["frame_accuracy"]
        grown = row.quality["frechet_distance"] / base.quality["frechet_distance"]
        if lost > POINTS:
            found.append(f"{row.form} in {row.runtime}: digits fall by {lost:.3f}")
        if grown > FRECHET:
            found.append(f"{row.form} in {row.runtime}: the Fréchet distance grows to {grown:.3f} times")
    return found


def table(rows: list[Row]) -> str:
    names = list(rows[0].quality)
    lines = [
        f"| runtime | form | MB | time / float's (p10 … p90) | PSNR to float, dB | {' | '.join(names)} |",
        f"|---|---|---:|---:|---:|{'---:|' * len(names)}",
    ]
    for row in rows:
        ratio = "1" if row.form == "float" else f"{row.ratio[0]:.3f} ({row.ratio[1]:.3f} … {row.ratio[2]:.3f})"
        fidelity = "" if row.form == "float" else f"{row.psnr:.1f}"
        figures = " | ".join(f"{value:.4g}" for value in row.quality.values())
        lines.append(f"| {row.runtime} | {row.form} | {row.megabytes:.1f} | {ratio} | {fidelity} | {figures} |")
    return "\n".join(lines)


def page(rows: list[Row], broken: list[str], load: tuple[float, ...], options: argparse.Namespace) -> str:
    verdict = "\n".join(f"- {line}" for line in broken) if broken else "All do."
    asked = f"--clips {options.clips} --rounds {options.rounds} --runtimes {options.runtimes}"
    return f"""# moving-digits in int8

    python tests/benchmarks/int8_digits.py {asked}

{machine_text()}; load {load[0]:.1f} before and {os.getloadavg()[0]:.1f} after.
{options.clips} clips of {STEPS} steps and guidance {GUIDANCE:g}, the same labels and seeds for all; times of
{options.rounds} rounds of {TIMED} clips, pipeline included, in turn. Calibration: 24 calls of each entry, from 2 other
samples. Clockwork's time and PSNR are beside the float engine too.

{table(rows)}

Digits may fall by {POINTS:g}, and the Fréchet distance grow to {FRECHET:g} times what there is without integers:

{verdict}
"""


if __name__ == "__main__":
    main()
