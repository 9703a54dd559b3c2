"""Large checkpoints on a small machine: time and memory of capture and of a full apply, beside ``cp`` and eager export.

Writes random float16 checkpoints of full size into a temporary folder (12 GB are needed), runs the command on them as
a user would, and prints Markdown; ``--out FILE`` keeps it. Exits with 1 where a bound does not hold.

make bench
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints import write_checkpoint
from growth import Curve, curves
from watched import Watched, watch

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "configs"
OPTPASS = str(Path(sys.executable).parent / "optpass")
RECIPE = "passes: [single-token-attention]\ntarget: onnxruntime\n"
GB = 1e9
EXPONENT = 1.15
INSPECTED: tuple[tuple[str, str], ...] = (("Flux", "flux-transformer"), ("SVD", "svd-unet"), ("SD 1.5", "sd15-unet"))
INSPECT_SECONDS, INSPECT_BYTES = 20.0, 1.0 * GB
"""Of a full configuration without weights."""


@dataclass(frozen=True)
class Model:
    """A checkpoint and what its apply may take: peak anonymous bytes, and CPU seconds."""

    name: str
    config: str
    anonymous: float
    cpu: float
    shard_bytes: int | None = None
    eager: bool = False


MODELS = (
    Model("SD 1.5 UNet", "sd15-unet", anonymous=1.2 * GB, cpu=60.0, eager=True),
    Model("SVD UNet", "svd-unet", anonymous=1.5 * GB, cpu=60.0, shard_bytes=1 << 30),
)


@dataclass(frozen=True)
class Bound:
    """One line of the verdict."""

    what: str
    found: float
    limit: float
    unit: str

    @property
    def holds(self) -> bool:
        return self.found <= self.limit


def bench_model(model: Model, folder: Path) -> tuple[list[str], list[Bound]]:
    """Rows of the table and bounds of one model, whose files lie in ``folder``."""
    checkpoint, out = folder / "checkpoint", folder / "out"
    size = write_checkpoint(CONFIGS / model.config, checkpoint, shard_bytes=model.shard_bytes)
    (folder / "recipe.yaml").write_text(RECIPE)
    os.sync()
    title = f"{model.name}, {size / GB:.2f} GB of float16 weights"
    copied = watch(["cp", "-r", str(checkpoint), str(folder / "copy")])
    shutil.rmtree(folder / "copy")
    rows = [_row(f"`cp`: {title}", copied)]
    rows.append(_row("`optpass inspect`", watch([OPTPASS, "inspect", str(checkpoint), "--json"])))
    applied = watch([OPTPASS, "apply", str(folder / "recipe.yaml"), str(checkpoint), "-o", str(out)])
    rows.append(_row("`optpass apply`: single-token-attention, ONNX Runtime bundle", applied))
    shutil.rmtree(out)
    if model.eager:
        script = str(Path(__file__).with_name("eager_export.py"))
        exported = watch([sys.executable, script, str(checkpoint), str(folder / "eager.onnx")])
        rows.append(_row("`torch.onnx.export` of the eager model", exported))
    bounds = [
        Bound(f"{model.name}: peak anonymous memory of apply", applied.anonymous / GB, model.anonymous / GB, "GB"),
        Bound(f"{model.name}: CPU time of apply", applied.cpu, model.cpu, "s"),
        Bound(f"{model.name}: wall time of apply, `cp` × 2 + 45", applied.wall, 2 * copied.wall + 45, "s"),
    ]
    return rows, bounds


def _row(name: str, found: Watched) -> str:
    memory = f"{found.anonymous / GB:.2f} | {found.resident / GB:.2f}"
    row = f"| {name} | {found.wall:.1f} | {found.cpu:.1f} | {memory} |"
    print(row, file=sys.stderr, flush=True)
    return row


def models(folder: Path) -> tuple[list[str], list[Bound]]:
    """The table of checkpoints with weights."""
    lines = [
        "## Checkpoints with weights",
        "",
        "| | wall s | CPU s | peak anonymous GB | peak resident GB |",
        "|---|---|---|---|---|",
    ]
    bounds: list[Bound] = []
    for model in MODELS:
        with tempfile.TemporaryDirectory(dir=folder) as home:
            rows, found = bench_model(model, Path(home))
        lines += rows
        bounds += found
    note = (
        "Anonymous memory (RssAnon, sampled every 20 ms) is what a process holds; resident memory counts mapped "
        "files too, whose pages the kernel drops when it needs them."
    )
    return [*lines, "", note], bounds


def structures(folder: Path) -> tuple[list[str], list[Bound]]:
    """The table of full configurations, inspected without weights."""
    lines = ["## Full configurations, inspected", "", "| | wall s | CPU s | peak resident GB |", "|---|---|---|---|"]
    bounds: list[Bound] = []
    for name, config in INSPECTED:
        if not (CONFIGS / config).is_dir():
            continue
        found = watch([OPTPASS, "inspect", str(CONFIGS / config), "--json"])
        lines.append(f"| {name} | {found.wall:.1f} | {found.cpu:.1f} | {found.resident / GB:.2f} |")
        bounds.append(Bound(f"{name}: wall time of inspect", found.wall, INSPECT_SECONDS, "s"))
        bounds.append(Bound(f"{name}: peak resident memory of inspect", found.resident / GB, INSPECT_BYTES / GB, "GB"))
    return lines, bounds


def growth(folder: Path) -> tuple[list[str], list[Bound]]:
    """The table of passes against node count."""
    found = curves()
    nodes = " | ".join(map(str, found[0].nodes))
    lines = [
        "## Time of a pass against nodes",
        "",
        "DiT blocks, 4 to 64 deep; CPU seconds, with the manager's checks around the pass.",
        "",
        f"| nodes | {nodes} | exponent |",
        f"|---|{'---|' * len(found[0].nodes)}---|",
        *map(_curve_row, found),
    ]
    return lines, [Bound(f"{curve.name}: growth exponent", curve.exponent, EXPONENT, "") for curve in found]


def _curve_row(curve: Curve) -> str:
    return f"| {curve.name} | {' | '.join(f'{s:.2f}' for s in curve.seconds)} | {curve.exponent:.2f} |"


SECTIONS: dict[str, Callable[[Path], tuple[list[str], list[Bound]]]] = {
    "models": models,
    "structures": structures,
    "growth": growth,
}


def _verdict(bounds: list[Bound]) -> Iterator[str]:
    yield "## Bounds"
    yield ""
    yield "| | found | bound | |"
    yield "|---|---|---|---|"
    for bound in bounds:
        yield f"| {bound.what} | {bound.found:.2f} {bound.unit} | {bound.limit:.2f} {bound.unit} | {_word(bound)} |"


def _word(bound: Bound) -> str:
    return "holds" if bound.holds else "**does not hold**"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory / GB:.0f} GB of memory."


def main() -> int:
    """Run the sections, print and keep the result; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="write the Markdown into this file")
    arguments = parser.parse_args()
    lines, bounds = ["# Scale", "", _machine()], []
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as folder:
        for name in arguments.sections:
            found, limits = SECTIONS[name](Path(folder))
            print("\n".join(found), flush=True)
            lines += ["", *found]
            bounds += limits
    verdict = list(_verdict(bounds))
    print("\n".join(verdict))
    whole = arguments.sections == list(SECTIONS)
    command = "make bench" if whole else f"python tests/benchmarks/scale.py {' '.join(arguments.sections)}"
    text = "\n".join([*lines, "", *verdict, "", f"Printed by `{command}`."])
    if arguments.out:
        arguments.out.write_text(f"{text}\n", "utf-8")
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
