"""SkipAt and ToSA on digits-vit, before and after healing, by the recipes that ship."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from digits_vit import FOLDER, costs, digits_vit, read_right, with_passes

from optpass.pipeline.recipe import find_recipe, load_recipe

BATCH = 48
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "SkipAt, Φ of convolutions": ("skipat-digits", {"phi": "conv"}),
    "SkipAt, Φ the identity": ("skipat-digits", {}),
    "ToSA, half of the tokens": ("tosa-digits", {}),
}
CHANGED = ("reuse-attention", "select-tokens")


def healed() -> str:
    """The page; trains anew."""
    measuring = MEASURING.format(cores=os.cpu_count(), machine=platform.machine())
    return "\n\n".join([HEAD, "\n".join([MEASURED, "|---|---:|---:|---:|---:|---:|", *_rows()]), measuring])


def _rows() -> Iterator[str]:
    original = digits_vit(BATCH)
    before = costs(original, BATCH)
    yield f"| original | {before.whole:.1f} | {before.attention:.1f} | | {read_right(original, BATCH):.2f} | |"
    for name, (recipe, options) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as work:
            passes = list(_passes(recipe, options, work))
            untrained, _ = with_passes(original, passes[:-1])
            start = time.process_time()
            after, _ = with_passes(original, passes)
            seconds = time.process_time() - start
            found, accuracy = costs(after, BATCH), read_right(after, BATCH)
        cells = [
            name,
            f"{found.whole:.1f} ({100 * (found.whole / before.whole - 1):+.1f} %)",
            f"{found.attention:.1f} ({100 * (found.attention / before.attention - 1):+.1f} %)",
            f"{read_right(untrained, BATCH):.2f}",
            f"{accuracy:.2f}",
            f"{seconds:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _passes(recipe: str, options: Mapping[str, Any], work: str) -> Iterator[dict[str, Any]]:
    """Those of the recipe, with ``options`` for what changes the model; its data by the whole path."""
    for step in load_recipe(find_recipe(recipe)).steps:
        given = dict(step.record.as_options())
        if step.name in CHANGED:
            given |= options
        elif step.record.heals:
            given |= {"data": f"{FOLDER / 'train.py'}:Drawn", "work": work}
        yield {step.name: given}


HEAD = """# SkipAt and ToSA on digits-vit, healed

The recipes `skipat-digits` (layers 3 to 8 take the attention before them) and `tosa-digits` (of layers 1, 3, … 11 only
some tokens take part) on the trained [digits-vit](../../tests/checkpoints/digits-vit/README.md): `distill` of all
weights, 300 updates of 48 drawn training scans, KL of the logits to the original's. Accuracy is of the 360 held-out
scans, of which one is 0.28 points. MACs are millions of one image; those of attention are of the layers without their
MLPs: projections, both products, and what takes their place. What was to be shown is SkipAt within half a point of the
original at 15 % fewer MACs of attention, after at most 20 minutes."""
MEASURED = "| | MACs, M | of attention, M | untrained, % | healed, % | CPU seconds |"
MEASURING = """Φ of convolutions costs what the projections cost, and saves the two products, a quarter of attention at
65 tokens of 96 channels; of the products alone half are gone. Φ the identity saves both. CPU seconds are those of the
whole recipe on one thread, {cores} cores ({machine}), shared."""
