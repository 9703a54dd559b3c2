"""What sparse attention does to a trained model: held-out digits that digits-vit reads, form by form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from attention_layer import table
from torch import Tensor

from optpass.capture.sources import capture
from optpass.evaluate.difference import program_runner
from optpass.ir.program import Program
from optpass.passes.simplify import Simplify
from optpass.passes.sparse_attention import SparseAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

BATCH = 72
FORMS: dict[str, dict[str, Any]] = {
    **{f"window, {2 * r + 1} × {2 * r + 1}": {"pattern": "window", "radius": (r, r), "tile": (2, 2)} for r in (1, 2)},
    **{
        f"draft per {per}, {round(100 * sparsity)} % dropped": {
            "pattern": "draft",
            "pool": (2, 2),
            "sparsity": sparsity,
            "per": per,
        }
        for sparsity in (0.5, 0.75, 0.9)
        for per in ("head", "row")
    },
}


def sparse_digits(checkpoint: Path) -> str:
    """The page, of digits-vit in the folder ``checkpoint``."""
    images, labels = held_out(checkpoint)
    program = capture(checkpoint, inputs={"pixel_values": (BATCH, 1, 32, 32)}, dtype=torch.float32)
    program, record = run_pass(program, Step("simplify", Simplify()))
    products = record.after.totals.macs_attention
    rows = [f"| dense | 100 % | {accuracy(program, images, labels, BATCH):.1f} % |"]
    for name, options in FORMS.items():
        after, record = run_pass(program, Step("sparse-attention", SparseAttention(**options)))
        assert len(record.sites) == 12, f"{name} declined: {record.declined}"
        share = 100 * record.after.totals.macs_attention / products
        rows.append(f"| {name} | {share:.0f} % | {accuracy(after, images, labels, BATCH):.1f} % |")
    return "\n\n".join([TEXT.format(count=len(labels)), table(HEADER, rows)])


def held_out(checkpoint: Path) -> tuple[Tensor, Tensor]:
    """Images and labels that digits-vit, in the folder ``checkpoint``, was not trained on."""
    training = _module(checkpoint / "train.py")
    scans, labels = training.digits("held-out")
    return training.render(scans), labels


def accuracy(program: Program, images: Tensor, labels: Tensor, batch: int) -> float:
    """Per cent that ``program`` reads right, ``batch`` at a time; the last images fill their batch up with zeros."""
    run, right = program_runner(program, "full"), 0
    for start in range(0, len(labels), batch):
        part = images[start : start + batch]
        filled = torch.cat([part, part.new_zeros(batch - len(part), *part.shape[1:])])
        [logits] = run({"pixel_values": filled}).values()
        right += int((logits[: len(part)].argmax(-1) == labels[start : start + batch]).sum())
    return 100 * right / len(labels)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module by its name.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


TEXT = """# Sparse attention in digits-vit, without training

All twelve attentions of [digits-vit](../../tests/checkpoints/digits-vit/README.md), 8 × 8 tokens and a class token that
attends to all; `simplify` and `sparse-attention` in each form, drafts with blocks of 2 × 2. Products are those inside
attention that are multiplied, among them those of the draft: a mask, which drafts per head have, saves none.
Accuracy is of the {count} held-out scans."""
HEADER = "| form | products | accuracy |"
