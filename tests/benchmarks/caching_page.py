"""The page of ``caching.py``: rows, what they are held to, and how they are told."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

SHARE = 0.9
"""Of the ratio of MACs, that a generation's speed-up reaches at least."""
SAME_ERROR = 0.05
"""dB of PSNR by which ways differ that count as equally good: those that compute one function do, by rounding."""
UNCACHED = 1
ENGINES = ("ONNX Runtime", "ONNX Runtime + calibrate-cache")
"""What is held to the bounds: at fixed periods, and at the steps that a calibration chose."""


@dataclass(frozen=True)
class Row:
    """One way at one number of steps; seconds of every clip's loop (also on a core) and of the whole call, its own
    uncached form's too.

    ``eager`` are those of the uncached eager module; ``macs`` is how many times the MACs of its UNet an uncached
    generation has. ``psnr`` (dB) and ``error`` (relative L2) are against the clips of its own uncached form.
    """

    owner: str
    cut: str
    branch: int | None
    every: int
    steps: int
    seconds: Sequence[float]
    cpu: Sequence[float]
    whole: Sequence[float]
    own: Sequence[float]
    own_cpu: Sequence[float]
    own_whole: Sequence[float]
    eager: Sequence[float]
    macs: float
    psnr: float
    error: float
    accuracy: float
    distance: float

    @property
    def speed_up(self) -> float:
        """Of the loop, against the way's own uncached form: the median over the clips."""
        return median(_ratios(self.own, self.seconds))

    @property
    def against_eager(self) -> float:
        """Of the loop, against the uncached eager module."""
        return median(_ratios(self.eager, self.seconds))

    @property
    def name(self) -> str:
        if self.every == UNCACHED:
            return f"{self.owner}, uncached"
        branch = f", branch {self.branch}" if self.owner == "DeepCache" else ""
        return f"{self.owner}{branch}"


@dataclass(frozen=True)
class Bound:
    """One line of the verdict: ``found`` is at least ``limit``."""

    what: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.found >= self.limit


def bounds(rows: Sequence[Row]) -> list[Bound]:
    """Speed-ups of our engines against their MACs, and against those of every peer's row that is no better."""
    engines = [row for row in rows if row.owner in ENGINES and row.every != UNCACHED]
    found = [Bound(f"{_place(row)}: speed-up by ratio of MACs", row.speed_up / row.macs, SHARE) for row in engines]
    for peer in (row for row in rows if row.owner == "DeepCache"):
        ours = [row for row in engines if row.steps == peer.steps and row.psnr >= peer.psnr - SAME_ERROR]
        fastest = max((median(_ratios(peer.seconds, row.seconds)) for row in ours), default=0.0)
        found.append(Bound(f"{peer.name}, {_place(peer)} ({peer.psnr:.1f} dB): its time by ours", fastest, 1.0))
    return found


def _place(row: Row) -> str:
    which = "calibrated" if row.owner == ENGINES[1] else f"period {row.every}"
    return f"`{row.cut}`, {which}, {row.macs:.2f} of MACs, {row.steps} steps"


def page(
    rows: Sequence[Row], memory: Mapping[str, tuple[int, int]], refused: Mapping[str, str], verdict: Sequence[Bound]
) -> str:
    """The page as Markdown."""
    lines = ["# Feature caching on moving-digits", "", *_introduction()]
    for steps in dict.fromkeys(row.steps for row in rows):
        lines += _table([row for row in rows if row.steps == steps], steps)
    lines += ["", *_memory(memory)]
    lines += ["", "## Peers that do not run on this checkpoint", ""]
    lines += [f"- {name}: `{reason}`" for name, reason in refused.items()]
    lines += [
        "",
        "Both reuse the residual of a chain of blocks of one shape, and a UNet has none at its outside.",
        "",
    ]
    lines += ["## Bounds", "", "| | found | at least | |", "|---|---|---|---|"]
    lines += [f"| {b.what} | {b.found:.2f} | {b.limit:.2f} | {_word(b)} |" for b in verdict]
    return "\n".join([*lines, "", "Printed by `make bench-caching`."])


def _memory(memory: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    yield from ("## Two engines in the space of one", "")
    yield (
        "Stable Diffusion 1.5's UNet at half its width, float32, batch 2 of 32×32 latents, after four steps: bytes of "
        "the engines' files, and anonymous memory of the process. The files share the weights. In memory each session "
        "has its weights in the layout of its kernels, so those of the small step are there twice; activations lie in "
        "one arena of all sessions."
    )
    yield from ("", "| | files, MB | in memory, MB |", "|---|---|---|")
    for name, (size, anonymous) in memory.items():
        yield f"| {name} | {size / 1e6:.1f} | {anonymous / 1e6:.0f} |"


def _word(bound: Bound) -> str:
    return "holds" if bound.holds else "**does not hold**"


def _introduction() -> Iterator[str]:
    peers = ("DeepCache", "cache-dit", "diffusers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in peers)
    yield (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread each way, float32, guidance 3 as a batch of 2. "
        f"Peers: {versions}. Every way makes one clip in turn, at equal seeds."
    )
    yield ""
    yield (
        "Speed-ups are of the loop of UNet calls and sampler steps, medians over the clips (10 % … 90 %): against the "
        "same engine uncached (also in the process's seconds on a core: the steadier figure where a machine has other "
        "work), and against the uncached eager module. PSNR and relative L2 are against the clips of the same engine "
        "uncached; digits and the Fréchet distance (few clips: compare it within the table alone) are the checkpoint's "
        "own evaluator's."
    )


def _table(rows: Sequence[Row], steps: int) -> Iterator[str]:
    yield from ("", f"## {steps} steps, {len(rows[0].seconds)} clips", "")
    yield (
        "| | cut | period | loop, s | speed-up | on a core | ratio of MACs | whole call | against eager | PSNR, dB | "
        "relative L2 | digits right | Fréchet |"
    )
    yield f"|{'---|' * 13}"
    for row in sorted(rows, key=lambda row: (row.cut != "", row.cut, row.every, row.owner)):
        yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Row) -> Iterator[str]:
    yield from (row.name, f"`{row.cut}`" if row.cut else "", _period(row))
    yield f"{median(row.seconds):.2f}"
    if row.every == UNCACHED:
        yield from ("", "", "", "")
    else:
        low, high = _spread(_ratios(row.own, row.seconds))
        yield from (f"{row.speed_up:.2f} ({low:.2f} … {high:.2f})", f"{median(_ratios(row.own_cpu, row.cpu)):.2f}")
        yield f"{row.macs:.2f}"
        yield f"{median(_ratios(row.own_whole, row.whole)):.2f}"
    yield f"{row.against_eager:.2f}"
    yield "" if row.every == UNCACHED else f"{row.psnr:.1f}"
    yield "" if row.every == UNCACHED else f"{row.error:.3f}"
    yield from (f"{row.accuracy:.1%}", f"{row.distance:.2f}")


def _period(row: Row) -> str:
    if row.owner == ENGINES[1]:
        return "calibrated"
    return str(row.every) if row.cut else ""


def _ratios(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(before, after, strict=True)]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]
