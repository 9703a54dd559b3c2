"""Token selection on digits-vit, trained weights, and its counts on DeiT."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from digits_vit import Timed, costs, digits_vit, read_right, with_passes

from optpass.analysis.attention import attentions
from optpass.analysis.cost import measure
from optpass.capture.sources import capture

BATCH, RUNS = 24, 30
ROWS: dict[str, dict[str, Any]] = {
    "merge, r = 2": {"r": 2},
    "merge, r = 4": {"r": 4},
    "merge, r = 5": {"r": 5},
    "merge, r = 8": {"r": 8},
    "merge, r from 8 to 0": {"r": 4, "inflect": -1.0},
    "merge, 7 % in each layer": {"ratio": 0.07},
    "merge, 16 in layers 0 and 2": {"r": 16, "layers": [0, 2]},
    "drop, rate 0.9 in 3, 6, 9": {"method": "drop", "rate": 0.9},
    "drop, rate 0.7": {"method": "drop", "rate": 0.7},
    "drop, rate 0.5": {"method": "drop", "rate": 0.5},
    "drop, rate 0.3": {"method": "drop", "rate": 0.3},
    "bypass, rate 0.7 in 1, 3, … 11": {"method": "bypass", "rate": 0.7, "surrogate": "column-mean"},
    "bypass, rate 0.5": {"method": "bypass", "rate": 0.5, "surrogate": "column-mean"},
    "bypass, rate 0.3": {"method": "bypass", "rate": 0.3, "surrogate": "column-mean"},
}
DEIT = {"tiny": (5, 13), "small": (5, 13), "base": (5, 13, 16)}


def tokens() -> str:
    """The page."""
    measuring = MEASURING.format(cores=os.cpu_count(), machine=platform.machine(), runs=RUNS, batch=BATCH)
    return "\n\n".join([HEAD, _table(MEASURED, _measured()), measuring, COUNTING, _table(COUNTED, _counted())])


def _table(head: str, rows: Iterator[str]) -> str:
    return "\n".join([head, "|".join(["", "---", *["---:"] * (head.count("|") - 2), ""]), *rows])


def _measured() -> Iterator[str]:
    programs = {batch: digits_vit(batch) for batch in (BATCH, 1)}
    timed = {batch: Timed(program) for batch, program in programs.items()}
    before = costs(programs[BATCH], BATCH)
    accuracy = read_right(programs[BATCH], BATCH)
    yield f"| original | {accuracy:.2f} | {before.whole:.1f} | {before.attention:.1f} | | 1 | 1 |"
    for name, options in ROWS.items():
        after = {batch: with_passes(program, [{"select-tokens": options}])[0] for batch, program in programs.items()}
        found = costs(after[BATCH], BATCH)
        cells = [
            name,
            f"{read_right(after[BATCH], BATCH):.2f}",
            f"{found.whole:.1f} ({100 * (found.whole / before.whole - 1):+.0f} %)",
            f"{found.attention:.1f} ({100 * (found.attention / before.attention - 1):+.0f} %)",
            str(attentions(after[BATCH]).found[-1].keys.size),
        ]
        for batch in (BATCH, 1):
            ratio = timed[batch].beside(after[batch], RUNS).ratio
            cells.append(f"{ratio.median:.2f} ({ratio.p10:.2f} … {ratio.p90:.2f})")
        yield f"| {' | '.join(cells)} |"


def _counted() -> Iterator[str]:
    for size, numbers in DEIT.items():
        with tempfile.TemporaryDirectory() as folder:
            config = {"architecture": f"deit_{size}_patch16_224"}
            Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
            program = capture(Path(folder), structure_only=True)
        before = measure(program).totals.macs
        for r in numbers:
            after, _ = with_passes(program, [{"select-tokens": {"r": r}}])
            last = attentions(after).found[-1].keys.size
            macs = measure(after).totals.macs
            cells = [
                f"DeiT-{size[0].upper()}, r = {r}",
                f"197 → {last} ({197 - 11 * r})",
                f"{before / 1e9:.3f} → {macs / 1e9:.3f}",
                f"{100 * (macs / before - 1):+.1f} %",
            ]
            yield f"| {' | '.join(cells)} |"


HEAD = """# Token selection on digits-vit

`select-tokens` without training on the trained [digits-vit](../../tests/checkpoints/digits-vit/README.md): 64 patches
and the class token, 12 layers. Accuracy is of the 360 held-out scans, of which one is 0.28 points. MACs are millions of
one image; those of attention are of the layers without their MLPs, matching and selection included. What was to be
shown is ToMe within a point of the original at 30 % fewer MACs."""
MEASURED = (
    "| | accuracy, % | MACs, M | of attention, M | tokens in the last layer | time, 24 images | time, one image |"
)
MEASURING = """Times are ONNX Runtime's, after / before, on {cores} CPU cores ({machine}), shared, one thread, random
inputs; engines are called in turn, {runs} times each: medians, p10 … p90 of the pairs. A selection is some thirty small
operators, which weigh on one image of 65 tokens of 96 channels: fewer places with more tokens each are faster there.
Digits are easy on tokens: most patches are black."""
COUNTING = """## Counts on DeiT

Structure only. In brackets the tokens by the published rule N − r·l, in the last of 12 layers; matching is counted."""
COUNTED = "| | tokens in the last layer | GMAC | |"
