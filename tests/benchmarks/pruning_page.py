"""The page of ``pruning.py``: what was measured, what it is held to, and how it is told."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from checkpoints import shapes
from pruning_models import CALLS, Outcome
from pruning_study import STEPS, Row, table

CONFIG = Path(__file__).parents[1] / "configs" / "sd15-unet"
GROUPS, WHOLE, MEMORY, OFF = 0.3, 10.0, 0.7e9, 0.02
"""Seconds to find groups and from the file to the pruned Program, bytes, how far a layer may be from what was asked."""
SAME = 1.03
"""Errors that differ by less are the same: the shares of MACs do too, by whole channels."""


@dataclass(frozen=True)
class Run:
    """One tool on SD 1.5 at one ratio: seconds of the process and its phases, peak anonymous bytes, shapes left.

    ``wanted`` is, from our run alone, the share of each dimension of each weight that is to stay.
    """

    way: str
    ratio: float
    wall: float
    anonymous: int
    phases: Mapping[str, float]
    shapes: Mapping[str, Sequence[int]]
    wanted: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Deviation:
    """Layers by how far the parameters that are left of them are from those that were asked for."""

    layers: int
    off: int
    worst: float
    layer: str


@dataclass(frozen=True)
class Bound:
    """One line of the verdict: ``found`` is at most ``limit``."""

    what: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.found <= self.limit


def deviation(run: Run, wanted: Mapping[str, Sequence[float]], whole: Mapping[str, Sequence[int]]) -> Deviation:
    """Of the matrices and kernels of ``run``: parameters left, by what both dimensions' shares ask for."""
    found = {
        name: prod(run.shapes[name]) / (prod(whole[name]) * prod(shares)) - 1
        for name, shares in wanted.items()
        if len(shares) > 1
    }
    layer = max(found, key=lambda name: abs(found[name]))
    return Deviation(len(found), sum(abs(value) > OFF for value in found.values()), found[layer], layer)


def bounds(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> list[Bound]:
    """What ours is held to."""
    found = []
    for run in runs:
        if run.way != "optpass":
            continue
        place = f"SD 1.5, ratio {run.ratio}"
        worst = deviation(run, run.wanted, _whole()).worst
        found += [
            Bound(f"{place}: seconds to find the groups", run.phases["groups"], GROUPS),
            Bound(f"{place}: seconds from the file to the pruned Program", sum(run.phases.values()), WHOLE),
            Bound(f"{place}: peak anonymous memory, GB", run.anonymous / 1e9, MEMORY / 1e9),
            Bound(f"{place}: largest deviation of a layer's parameters", abs(worst), OFF),
        ]
    for each in outcomes:
        if not each.refused:
            what = f"{each.model}, ratio {each.ratio}: our error by the peer's, MACs no more"
            found.append(Bound(what, each.ours_error / each.error, SAME))
    return found


def _whole() -> Mapping[str, Sequence[int]]:
    return shapes(CONFIG)


def page(
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    plots: Sequence[str],
    verdict: Sequence[Bound],
    clips: int,
) -> str:
    """The page as Markdown; ``plots`` are names of files, ``clips`` the number that each way made."""
    lines = ["# Pruning beside Torch-Pruning", "", *_introduction()]
    lines += _whole_model(runs) if runs else []
    lines += _models(outcomes) if outcomes else []
    lines += _study(rows, plots, clips) if rows else []
    lines += ["## Bounds", "", "| | found | at most | |", "|---|---|---|---|"]
    for bound in verdict:
        holds = "holds" if bound.holds else "**not**"
        lines.append(f"| {bound.what} | {bound.found:.3g} | {bound.limit:g} | {holds} |")
    return "\n".join([*lines, "", "```sh", "make bench-pruning", "```"])


def _introduction() -> list[str]:
    names = ("torch", "torch-pruning", "onnxruntime", "diffusers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return [
        f"{versions}; Python {platform.python_version()}, {os.cpu_count()} cores, one thread. Both take the same share",
        "of every group, residual streams, widths of heads and feed-forwards among them, and rank channels by the norm",
        "of all weights that write or read them.",
        "",
    ]


def _whole_model(runs: Sequence[Run]) -> list[str]:
    lines = [
        "## Stable Diffusion 1.5",
        "",
        "The whole UNet, 860 M random parameters in a float16 file. Seconds are the least of several processes, memory",
        "(anonymous, peak) the most. A layer is off where the parameters that are left of it differ from what both its",
        "sides' ratios ask for by more than 2 %.",
        "",
        "| | ratio | to read, s | groups, s | to prune, s | memory, GB | parameters left | layers off | worst layer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole = _whole()
    total = sum(map(prod, whole.values()))
    for run in runs:
        wanted = next(each.wanted for each in runs if each.way == "optpass" and each.ratio == run.ratio)
        off, phases = deviation(run, wanted, whole), dict(run.phases)
        read = phases.get("capture", phases.get("load", 0.0))
        left = sum(map(prod, run.shapes.values())) / total
        worst = f"`{off.layer}` {off.worst:+.0%}" if off.off else "–"
        times = f"{read:.1f} | {phases['groups']:.2f} | {phases['prune']:.1f}"
        lines.append(
            f"| {run.way} | {run.ratio} | {times} | {run.anonymous / 1e9:.2f} | {left:.3f} "
            f"| {off.off} of {off.layers} | {worst} |"
        )
    return [*lines, ""]


def _models(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "## Equal MACs",
        "",
        f"Relative L2 error of the output over {CALLS} calls, nothing healed. The peer is given the ratio, and leaves",
        "a share of the MACs; `macs` of `prune-channels` is that share. Group norms and whole channels round: ours",
        "never has more MACs. Time is of a call of ONNX Runtime, the peer's and ours in turn.",
        "",
        "| model, weights | ratio | MACs: peer | ours | error: peer | ours | ms: peer | ours | ours at equal ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        name = f"| {each.model}, {each.weights} | {each.ratio} "
        even = f"{each.even_macs:.3f} of MACs, error {each.even_error:.3f}"
        if each.latency is None:
            lines.append(f"{name}| fails: {each.refused} | – | – | – | – | – | {even} |")
            continue
        times = f"{each.latency.before.median:.1f} | {each.latency.after.median:.1f}"
        costs = f"{each.macs:.3f} | {each.ours_macs:.3f} | {each.error:.3f} | {each.ours_error:.3f}"
        lines.append(f"{name}| {costs} | {times} | {even} |")
    return [*lines, ""]


def _study(rows: Sequence[Row], plots: Sequence[str], clips: int) -> list[str]:
    return [
        "## moving-digits before healing",
        "",
        f"After `single-token-attention`; {clips} clips of {STEPS} steps at equal seeds, with ONNX Runtime. Shares are",
        "of the original after that pass. `taylor` sees random calls, `prune-blocks` those of the pipeline.",
        "",
        *table(rows),
        "",
        *[f"![{name}]({name})" for name in plots],
        "",
    ]
