"""What a bundle holds in memory after a few steps: loads it, calls it, prints the anonymous bytes of this process.

python caching_memory.py BUNDLE
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoints import write_checkpoint
from watched import watch

from optpass.evaluate.trials import random_inputs
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.loading import load

CONFIG = Path(__file__).parents[1] / "configs" / "sd15-unet" / "config.json"
STEPS = 4
BUNDLES: Mapping[str, list[dict[str, dict[str, object]]]] = {
    "one engine, uncached": [],
    "two engines, `up_blocks.2` every second step": [{"cache-features": {"cut": "up_blocks.2", "every": 2}}],
}


def bundles_in_memory(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes of the engines' files and anonymous bytes of a process that runs them, for each of :data:`BUNDLES`.

    The model is Stable Diffusion 1.5's UNet at half its width, with random weights; ``folder`` takes 2.5 GB.
    """
    config = json.loads(CONFIG.read_text())
    config |= {"block_out_channels": [160, 320, 640, 640], "sample_size": 32}
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder / "config", folder / "checkpoint")
    found = {}
    for name, passes in BUNDLES.items():
        settings = {"dtype": "float32", "inputs": {"sample": [2, 4, 32, 32]}, "passes": passes}
        recipe = make_recipe({**settings, "target": {"onnxruntime": {"threads": 1}}})
        made = apply(recipe, Request(str(folder / "checkpoint"), folder / "bundle", verify="never", baseline=False))
        size = sum(path.stat().st_size for path in made.folder.glob("*.onnx*"))
        run = watch([sys.executable, __file__, str(made.folder)])
        found[name] = size, int(run.printed.split()[-1])
        shutil.rmtree(made.folder)
    return found


def main() -> None:
    """Run a few steps of one generation."""
    module = load(sys.argv[1], verify=False)
    inputs = random_inputs(module.inputs_at(), {}, 0)
    for step in range(STEPS):
        module(**{**inputs, "timestep": torch.full_like(inputs["timestep"], 900 - step)})
        inputs["sample"] = inputs["sample"] + 0.01
    (anonymous,) = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    print(int(anonymous) * 1024)


if __name__ == "__main__":
    main()
