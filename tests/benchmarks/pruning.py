"""Pruning beside Torch-Pruning: Stable Diffusion 1.5 whole, small models at equal MACs; and moving-digits' quality.

Prints Markdown; ``--out FILE`` keeps it, with its plots beside as SVG. Exits with 1 where a bound does not hold. Needs
the peer (``pip install -e '.[peers]'``), 2 GB of disk and 9 GB of memory.

make bench-pruning
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint
from pruning_models import Outcome, compare, models
from pruning_page import CONFIG, Run, bounds, page
from pruning_study import CLIPS, Row, plots, study
from watched import watch

from optpass.report.render import render_plot

SCRIPT = Path(__file__).with_name("pruning_once.py")
WAYS = ("optpass", "torch-pruning")
RATIOS = (0.3, 0.5)
RUNS = 3
PARTS = ("sd15", "models", "study")


def whole_model(folder: Path, runs: int) -> list[Run]:
    """Both on SD 1.5's UNet, random float16 weights, a process each, in turn; of every figure the least of ``runs``."""
    write_checkpoint(CONFIG, folder)
    found: dict[tuple[str, float], list[Run]] = {}
    for _ in range(runs):
        for ratio in RATIOS:
            for way in WAYS:
                run = _once(way, folder, ratio)
                found.setdefault((way, ratio), []).append(run)
                print(f"SD 1.5, {ratio}: {way}, {run.wall:.1f} s, {run.anonymous / 1e6:.0f} MB", file=sys.stderr)
    return [_least(each) for each in found.values()]


def _once(way: str, folder: Path, ratio: float) -> Run:
    watched = watch([sys.executable, str(SCRIPT), way, str(folder), str(ratio)])
    said: dict[str, Any] = json.loads(watched.printed.decode().splitlines()[-1])
    return Run(way, ratio, watched.wall, watched.anonymous, said["phases"], said["shapes"], said["wanted"])


def _least(runs: Sequence[Run]) -> Run:
    first = runs[0]
    phases = {name: min(run.phases[name] for run in runs) for name in first.phases}
    wall, anonymous = min(run.wall for run in runs), max(run.anonymous for run in runs)
    return Run(first.way, first.ratio, wall, anonymous, phases, first.shapes, first.wanted)


def small_models() -> list[Outcome]:
    """Both on every small model."""
    found = []
    for model in models():
        for ratio in RATIOS:
            print(f"{model.name}, {ratio}", file=sys.stderr, flush=True)
            found.append(compare(model, ratio))
    return found


def main() -> int:
    """Measure, print and keep the page; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--runs", type=int, default=RUNS, help="processes of each tool and ratio")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of each way")
    parser.add_argument("--out", type=Path, help="write the Markdown into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Run] = []
    outcomes: list[Outcome] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as home:
        if "sd15" in arguments.parts:
            runs = whole_model(Path(home, "sd15"), arguments.runs)
        if "models" in arguments.parts:
            outcomes = small_models()
        if "study" in arguments.parts:
            rows = study(Path(home), arguments.clips)
    drawn = plots(rows) if rows else []
    out: Path | None = arguments.out
    names = [f"{out.stem}-{index}.svg" for index in range(len(drawn))] if out else []
    verdict = bounds(runs, outcomes)
    text = page(runs, outcomes, rows, names, verdict, arguments.clips)
    print(text)
    if out:
        out.write_text(f"{text}\n", "utf-8")
        for name, plot in zip(names, drawn, strict=True):
            out.with_name(name).write_text(render_plot(plot), "utf-8")
    return 0 if all(bound.holds for bound in verdict) else 1


if __name__ == "__main__":
    sys.exit(main())
