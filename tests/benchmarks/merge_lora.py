"""Merging a LoRA into SD 1.5's UNet, beside peft: memory, CPU time, and how far the results are apart.

Writes a random float16 checkpoint of 860 M parameters and a rank-16 adapter of its 160 attention and feed-forward
linears into a temporary folder (12 GB are needed), merges it with peft and with optpass in turn, and prints
Markdown; ``--out FILE`` keeps it. Exits with 1 where a bound does not hold.

make bench-lora
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import STEM, shapes, write_checkpoint
from merging import WEIGHTS
from safetensors import safe_open
from safetensors.torch import save_file
from watched import Watched, watch

from optpass.ir.safetensors_io import read_safetensors, write_safetensors
from optpass.ir.weights import Cast

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "configs" / "sd15-unet"
SCRIPT = Path(__file__).with_name("merging.py")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
WAYS = {
    "peft": "peft: `from_pretrained`, `merge_and_unload`, `save_pretrained`",
    "optpass": "optpass, weights to weights: `match_adapter`, `merged`, `write_safetensors`",
    "pass": "optpass, the pass: `capture`, `merge-lora`, `write_safetensors`",
}
RANK, LAYERS, RUNS = 16, 160, 4
ANONYMOUS = 700e6
HALF, SINGLE = 1e-3, 1e-6
"""The largest difference from peft, by the largest value of each weight, in float16 and float32."""


@dataclass(frozen=True)
class Run:
    """One process: what was watched of it, and the CPU seconds of its phases."""

    watched: Watched
    phases: Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """One line of the verdict."""

    what: str
    found: float
    limit: float
    shown: str = "{:.2f}"

    @property
    def holds(self) -> bool:
        return self.found <= self.limit


def write_adapter(folder: Path) -> None:
    """A LoRA as peft saves it, every factor random."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes(CONFIG).items():
        path = name.removesuffix(".weight")
        if not name.endswith(".weight") or not path.endswith(TARGETS):
            continue
        # Products of the size of the checkpoint's own values, 0.02.
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.05
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.05
    assert len(tensors) == 2 * LAYERS
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge(way: str, checkpoint: Path, adapter: Path, out: Path) -> Run:
    """One process, from the files to the merged file."""
    found = watch([sys.executable, str(SCRIPT), way, str(checkpoint), str(adapter), str(out)])
    run = Run(found, json.loads(found.printed.decode().splitlines()[-1]))
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.phases.items())
    print(
        f"{way}: {found.wall:.1f} s, {found.cpu:.1f} CPU s, {found.anonymous / 1e6:.0f} MB ({phases})", file=sys.stderr
    )
    return run


def alternate(checkpoint: Path, adapter: Path, folder: Path) -> dict[str, list[Run]]:
    """``RUNS`` merges by each way, in turn; the results of the last stay in ``folder``."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    for _ in range(RUNS):
        for way, found in runs.items():
            shutil.rmtree(folder / way, ignore_errors=True)
            os.sync()
            found.append(merge(way, checkpoint, adapter, folder / way))
    return runs


def difference(ours: Path, theirs: Path) -> float:
    """The largest of all tensors' max|a−b| / max|b|."""
    worst = 0.0
    with safe_open(ours / WEIGHTS, framework="pt") as a, safe_open(theirs / WEIGHTS, framework="pt") as b:
        assert set(a.keys()) == set(b.keys())
        for name in b.keys():  # noqa: SIM118 safe_open is no mapping
            found, expected = a.get_tensor(name).double(), b.get_tensor(name).double()
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def widen(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint in float32."""
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = read_safetensors(checkpoint / f"{STEM}.safetensors")
    write_safetensors({name: Cast(w, torch.float32) for name, w in weights.items()}, folder / WEIGHTS)
    return folder


def _row(name: str, runs: Sequence[Run]) -> str:
    phases = "; ".join(f"{phase} {min(run.phases[phase] for run in runs):.1f}" for phase in runs[0].phases)
    memory = max(run.watched.anonymous for run in runs) / 1e6
    wall, cpu = min(run.watched.wall for run in runs), _cpu(runs)
    return f"| {name} | {wall:.1f} | {cpu:.1f} | {memory:.0f} | {phases} |"


def _cpu(runs: Sequence[Run]) -> float:
    return min(run.watched.cpu for run in runs)


def report(
    runs: Mapping[str, Sequence[Run]], half: float, single: float, moved: float
) -> tuple[list[str], list[Bound]]:
    """The page, and what it is held to; ``moved`` is how far the merge took a weight from the checkpoint's."""
    peak = max(run.watched.anonymous for way in ("optpass", "pass") for run in runs[way])
    bounds = [
        Bound("peak anonymous memory, weights to weights and by the pass, MB", peak / 1e6, ANONYMOUS / 1e6, "{:.0f}"),
        Bound("CPU seconds of the process, weights to weights, and peft's", _cpu(runs["optpass"]), _cpu(runs["peft"])),
        Bound("largest difference from peft, float16", half, HALF, "{:.1e}"),
        Bound("largest difference from peft, float32", single, SINGLE, "{:.1e}"),
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        "# Merging a LoRA",
        "",
        f"SD 1.5's UNet, 860 M random float16 weights; a LoRA of rank {RANK} on {LAYERS} linears. {os.cpu_count()} CPU "
        f"cores ({platform.machine()}), {memory:.0f} GB of memory; one thread each. Of {RUNS} runs in turn, the least "
        "of each figure (what else runs on a machine only adds to it), and the most of memory.",
        "",
        "| | wall s | CPU s | peak anonymous MB | CPU s by phase |",
        "|---|---|---|---|---|",
        *(_row(name, runs[way]) for way, name in WAYS.items()),
        "",
        "Each is a whole process, imports included, that writes the whole merged checkpoint; ours refuses NaN and Inf "
        "and hashes the file besides. Weights to weights is the like of what peft does: the same adaptations as the "
        "pass makes, matched by name. The pass works on a captured model, and capture traces the graph that later "
        "passes and targets need; peft makes no graph, so that row has more in it than a merge.",
        "",
        "Differences are max|ours − peft's| / max|peft's| of each weight, the worst of all; by the same measure the "
        f"merge moved a weight by {moved:.2f}. The adapter is float32, so that peft too rounds each sum once.",
        "",
        "| | found | bound | |",
        "|---|---|---|---|",
        *(
            f"| {b.what} | {b.shown.format(b.found)} | {b.shown.format(b.limit)} | "
            f"{'holds' if b.holds else '**does not hold**'} |"
            for b in bounds
        ),
        "",
        "Printed by `make bench-lora`.",
    ]
    return lines, bounds


def main() -> int:
    """Run it, print and keep the result; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the Markdown into this file")
    arguments = parser.parse_args()
    # A thread that waits for work counts as CPU time.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as home:
        folder = Path(home)
        checkpoint, adapter = folder / "checkpoint", folder / "adapter"
        write_checkpoint(CONFIG, checkpoint)
        write_adapter(adapter)
        runs = alternate(checkpoint, adapter, folder)
        half = max(difference(folder / way, folder / "peft") for way in ("optpass", "pass"))
        moved = difference(checkpoint, folder / "peft")
        wide = widen(checkpoint, folder / "wide")
        for way in ("optpass", "peft"):
            shutil.rmtree(folder / way)
            merge(way, wide, adapter, folder / way)
        single = difference(folder / "optpass", folder / "peft")
    lines, bounds = report(runs, half, single, moved)
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(f"{text}\n", "utf-8")
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
