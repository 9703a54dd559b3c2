"""PADRe on digits-vit, before and after healing, by the recipe that ships."""

from __future__ import annotations

from pathlib import Path

import torch
from attention_layer import table
from sparse_digits import accuracy, held_out

from optpass.capture.sources import capture
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import find_recipe, load_recipe, make_recipe

BATCH = 48


def padre_digits(checkpoint: Path) -> str:
    """The page, of digits-vit in the folder ``checkpoint``; trains, or finds what was trained before."""
    images, labels = held_out(checkpoint)
    steps = {step.name: dict(step.record.as_options()) for step in load_recipe(find_recipe("padre-digits")).steps}
    steps["distill"]["data"] = f"{checkpoint / 'train.py'}:Drawn"
    program = capture(checkpoint, inputs={"pixel_values": (BATCH, 1, 32, 32)}, dtype=torch.float32)
    # The teacher is the model as captured.
    programs = {"original": program}
    names = list(steps)
    for label, count in (("PADRe-2, untrained", 2), ("PADRe-2, healed", 3)):
        made = make_recipe({"passes": [{name: steps[name]} for name in names[:count]]})
        programs[label], records = run_passes(program, made.steps)
        assert len(records[1].sites) == 12, f"declined: {records[1].declined}"
        totals = {"original": records[0].before.totals, "changed": records[1].after.totals}
    rows = []
    for label, each in programs.items():
        found = totals["original" if label == "original" else "changed"]
        cells = [f"{found.macs / BATCH / 1e6:.2f}", f"{found.parameters / 1e6:.3f}"]
        rows.append(f"| {label} | {' | '.join(cells)} | {accuracy(each, images, labels, BATCH):.2f} % |")
    return "\n\n".join([TEXT.format(count=len(labels), one=100 / len(labels)), table(HEADER, rows)])


TEXT = """# PADRe on digits-vit, healed

The recipe `padre-digits` on the trained [digits-vit](../../tests/checkpoints/digits-vit/README.md): all twelve
attentions replaced by polynomials of degree 2 with kernels of 3 × 3 over its 8 × 8 tokens, which begin at zero; then
`distill` of all weights, 600 updates of 48 drawn training scans, KL of the logits to the original's, some six minutes
of one core. Accuracy is of the {count} held-out scans, of which one is {one:.2f} points; MACs are of one image."""
HEADER = "| | MACs, M | parameters, M | accuracy |"
