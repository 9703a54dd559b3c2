"""Prunes a diffusers checkpoint once, in a process of its own: prints seconds of each phase and the shapes left.

python pruning_once.py optpass|torch-pruning FOLDER RATIO
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


class Phases:
    """Seconds since the last one."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.found[name], self._last = now - self._last, now


def ours(folder: Path, ratio: float) -> tuple[dict[str, float], dict[str, list[int]], dict[str, list[float]]]:
    """Phases, shapes of weights, and what share of each of their dimensions is to stay."""
    from optpass.analysis.axes import axes_of
    from optpass.capture.sources import capture
    from optpass.passes.prune_channels import PruneChannels
    from optpass.pipeline.passes import Context

    phases = Phases()
    program = capture(folder)
    phases.end("capture")
    found = axes_of(program)
    groups = found.groups
    phases.end("groups")
    record = PruneChannels(ratio=ratio)
    after = record.run(program.copy(), Context())
    phases.end("prune")
    wanted = {name: [1.0] * len(expression.shape) for name, expression in program.weights.items()}
    for group in groups:
        for item in group.slices if group.kind in record.kinds else ():
            wanted[item.weight][item.dim] = 1 - ratio
    return phases.found, {name: list(expression.shape) for name, expression in after.weights.items()}, wanted


def theirs(folder: Path, ratio: float) -> tuple[dict[str, float], dict[str, list[int]], dict[str, list[float]]]:
    """As :func:`ours`; what is to stay is the same, and not said again."""
    import pruning_peers
    from diffusers import UNet2DConditionModel

    phases = Phases()
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    size, width = model.config.sample_size, model.config.cross_attention_dim
    inputs = {
        "sample": torch.randn(1, model.config.in_channels, size, size),
        "timestep": torch.tensor([10.0]),
        "encoder_hidden_states": torch.randn(1, 77, width),
        "return_dict": False,
    }
    phases.end("load")
    made = pruning_peers.pruner(model, inputs, "conv_out", ratio)
    phases.end("groups")
    made.step()
    pruning_peers.patch(model)
    phases.end("prune")
    return phases.found, {name: list(value.shape) for name, value in model.named_parameters()}, {}


def main() -> None:
    """Prune, and print."""
    way, folder, ratio = sys.argv[1:]
    phases, shapes, wanted = (ours if way == "optpass" else theirs)(Path(folder), float(ratio))
    print(json.dumps({"phases": phases, "shapes": shapes, "wanted": wanted}))


if __name__ == "__main__":
    main()
