"""Regenerate the committed results: every file here is what the command at its bottom printed.

make results; or some of them by name, of the models also one library's alone (``models-timm``).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adapters_table import adapters
from clockwork_digits import clockwork_digits
from clockwork_table import clockwork
from cutting_table import cutting
from healed_table import healed
from hoist_table import hoist
from memory_table import memory
from models_table import FAMILIES, models
from padre_digits import padre_digits
from padre_table import padre
from skipat_table import skipat
from sparse_digits import sparse_digits
from sparse_table import sparse
from structure_table import structure
from tokens_table import tokens

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "benchmarks"))

from reparameterized import reparameterized  # noqa: E402 - found on the path above
from watched import watch  # noqa: E402 - found on the path above

RESULTS = Path(__file__).parent
SVD, SD15 = "tests/configs/svd-unet", "tests/configs/sd15-unet"
DIGITS = "tests/checkpoints/moving-digits"


class Run(NamedTuple):
    """One run of the command: what it printed, wall seconds, peak resident megabytes, CPU seconds."""

    record: dict[str, Any]
    seconds: float
    megabytes: float
    cpu_seconds: float


def optpass(*arguments: str) -> Run:
    """Run the command with ``--json``."""
    found = watch([str(Path(sys.executable).parent / "optpass"), *arguments, "--json"], cwd=ROOT)
    return Run(json.loads(found.printed), found.wall, found.resident / 1e6, found.cpu)


def published_counts() -> str:
    """SVD's and SD 1.5's costs beside the published ones."""
    wide = optpass("inspect", SVD, "--inputs", "sample=1x14x8x72x128")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("mobilevd-cross-attention", SVD, "-o", f"{folder}/out", "--structure-only")
        applied = optpass("apply", *arguments)
    sd15 = optpass("inspect", SD15, "--inputs", "sample=1x4x64x64")
    [item] = applied[0]["passes"]
    before, after = item["before"]["totals"], item["after"]["totals"]
    large, small = wide[0]["totals"], sd15[0]["totals"]
    rows = [
        ("SVD, parameters, M", 1524.62, before["parameters"] / 1e6),
        ("SVD, parameters after single-token-attention, M", 1474.28, after["parameters"] / 1e6),
        ("SVD, sites of single-token-attention", 32, item["sites"]),
        ("SVD 14×512×256, TFLOP", 8.459, 2 * before["macs"] / 1e12),
        ("SVD 14×512×256 after, TFLOP", 8.076, 2 * after["macs"] / 1e12),
        ("SVD 14×1024×576, TFLOP", 44.80, 2 * large["macs"] / 1e12),
        ("SD 1.5 64×64, GMAC without attention matmuls", 338.6, (small["macs"] - small["macs_attention"]) / 1e9),
        ("SD 1.5 64×64, GMAC", 401.7, small["macs"] / 1e9),
    ]
    lines = [
        "# Published counts, structure only",
        "",
        "FLOP = 2·MAC; linear, convolution, matmul and attention (QKᵀ and AV) are counted. No weights are read.",
        "",
        "| | published | optpass | difference |",
        "|---|---|---|---|",
        *(f"| {name} | {a:g} | {b:.6g} | {100 * (b / a - 1):+.2f} % |" for name, a, b in rows),
        "",
        "| command | wall seconds | peak resident MB |",
        "|---|---|---|",
        f"| `optpass inspect` of SVD at 1024×576 | {wide[1]:.1f} | {wide[2]:.0f} |",
        f"| `optpass apply` of single-token-attention to SVD at 512×256 | {applied[1]:.1f} | {applied[2]:.0f} |",
        f"| `optpass inspect` of SD 1.5 | {sd15[1]:.1f} | {sd15[2]:.0f} |",
    ]
    return "\n".join(lines)


def moving_digits() -> str:
    """The demo's figures: contract, engine against the original, clips, latency."""
    with tempfile.TemporaryDirectory() as folder:
        report, seconds, memory, _ = optpass("apply", "moving-digits", DIGITS, "-o", f"{folder}/out", "--samples", "6")
    lines = ["# moving-digits through ONNX Runtime, trained weights", "", _machine(), ""]
    lines += ["| | single-token-attention, float32 |", "|---|---|"]
    lines += [f"| {name} | {read(report)} |" for name, read in FIGURES.items()]
    lines += ["", f"The whole apply took {seconds:.0f} s and {memory:.0f} MB, evidence included."]
    return "\n".join(lines)


def _latency(report: dict[str, Any]) -> str:
    ratio = report["latency"]["ratio"]
    medians = f"{report['latency']['before']['median']:.1f} → {report['latency']['after']['median']:.1f} ms"
    return f"{medians}; {ratio['median']:.2f} ({ratio['p10']:.2f} … {ratio['p90']:.2f})"


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "sites": lambda r: str(r["passes"][0]["sites"]),
    "contract": lambda r: f"{r['passes'][0]['contract']}: {r['passes'][0]['verified']}",
    "relative error of the pass": lambda r: f"{r['passes'][0]['difference']['relative_error']:.2g}",
    "parameters, M": lambda r: _change(r, "parameters", 1e6),
    "MACs a call, G": lambda r: _change(r, "macs", 1e9),
    "weights, MB": lambda r: _change(r, "weight_bytes", 1e6),
    "engine against the original, relative error": lambda r: f"{r['engine_difference']['relative_error']:.2g}",
    "6 clips at equal seeds, PSNR (300 dB: identical)": lambda r: f"{r['samples']['psnr']:.1f} dB",
    "frames read right": lambda r: _quality(r, "frame_accuracy"),
    "temporal consistency": lambda r: _quality(r, "temporal_consistency"),
    "engine latency a call, median; ratio (p10 … p90)": _latency,
}


def _change(report: dict[str, Any], key: str, unit: float) -> str:
    before, after = (report[side]["totals"][key] / unit for side in ("before", "after"))
    return f"{before:.3f} → {after:.3f}"


def _quality(report: dict[str, Any], key: str) -> str:
    samples = report["samples"]
    return f"{samples['quality_before'][key]:.4f} → {samples['quality_after'][key]:.4f}"


def _machine() -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), shared; compare ratios, not seconds."


def main(names: Sequence[str]) -> None:
    """Write the named results, all by default."""
    table = RESULTS / "models.md"
    known: dict[str, Callable[[], str]] = {
        "published-counts": published_counts,
        "moving-digits": moving_digits,
        "adapters": partial(adapters, optpass),
        "reparameterize": reparameterized,
        "clockwork": partial(clockwork, optpass, ROOT),
        "clockwork-digits": partial(clockwork_digits, ROOT / DIGITS),
        "healed-digits": healed,
        "hoist-invariants": hoist,
        "cutting": cutting,
        "memory": memory,
        "skipat": partial(skipat, optpass),
        "padre": partial(padre, RESULTS / "padre.md"),
        "padre-digits": partial(padre_digits, ROOT / "tests" / "checkpoints" / "digits-vit"),
        "sparse": sparse,
        "sparse-digits": partial(sparse_digits, ROOT / "tests" / "checkpoints" / "digits-vit"),
        "structure": partial(structure, optpass, ROOT),
        "tokens": tokens,
        "models": partial(models, optpass, table),
    }
    parts = {f"models-{family}": partial(models, optpass, table, (family,)) for family in FAMILIES}
    for name in names or known:
        text = {**known, **parts}[name]()
        result = "models" if name in parts else name
        path = RESULTS / f"{result}.md"
        path.write_text(f"{text}\n\nPrinted by `python docs/results/regenerate.py {result}`.\n", "utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
