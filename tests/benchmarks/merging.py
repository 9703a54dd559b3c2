"""One merge of an adapter into a UNet's checkpoint, in a process of its own: by peft or by optpass.

python merging.py peft|optpass|pass CHECKPOINT ADAPTER OUT

Prints the CPU seconds (user and system, all threads) of each phase as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Phases:
    """CPU seconds by phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


def by_peft(checkpoint: Path, adapter: Path, out: Path, phase: Phases) -> None:
    """As peft's documentation has it: load the model in its own dtype, load the adapter, merge, save."""
    with phase("import"):
        import torch
        from diffusers import UNet2DConditionModel
        from peft import PeftModel
    with phase("load"), torch.no_grad():
        unet = UNet2DConditionModel.from_pretrained(checkpoint, torch_dtype=_dtype(checkpoint), local_files_only=True)
        adapted = PeftModel.from_pretrained(unet, str(adapter))
    with phase("merge"), torch.no_grad():
        merged = adapted.merge_and_unload()
    with phase("write"):
        merged.save_pretrained(out)


def _dtype(checkpoint: Path) -> Any:
    """The checkpoint's own dtype, which its configuration does not say."""
    from safetensors import safe_open

    with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
        return file.get_tensor("conv_in.bias").dtype


def by_optpass(checkpoint: Path, adapter: Path, out: Path, phase: Phases) -> None:
    """The same, from weights to weights: matched by name, merged lazily, streamed and hashed."""
    with phase("import"):
        from optpass.adapters.adaptation import merged
        from optpass.adapters.matching import Adaptable, match_adapter
        from optpass.adapters.reading import read_adapter
        from optpass.capture.checkpoint_weights import folder_weights
        from optpass.ir.safetensors_io import write_safetensors
    with phase("load"):
        weights, found = folder_weights(checkpoint), read_adapter(adapter)
        assert weights is not None
        found.check_finite()
    with phase("merge"):
        matched = match_adapter(found, Adaptable.of_weights(weights)).weights
        weights |= {name: merged(weights[name], [(adaptation, 1.0)]) for name, adaptation in matched.items()}
    with phase("write"):
        out.mkdir()
        write_safetensors(weights, out / WEIGHTS, metadata={"format": "pt"})


def by_pass(checkpoint: Path, adapter: Path, out: Path, phase: Phases) -> None:
    """The pass ``merge-lora``: capture, the pass with the manager's checks around it, the same writer."""
    with phase("import"):
        import diffusers  # noqa: F401 what capture imports when it builds the model

        from optpass.capture.sources import capture
        from optpass.ir.safetensors_io import write_safetensors
        from optpass.passes.merge_lora import MergeLora
        from optpass.pipeline.manager import run_pass
        from optpass.pipeline.recipe import Step
    with phase("capture"):
        program = capture(checkpoint)
    with phase("merge"):
        merged, _ = run_pass(program, Step("merge-lora", MergeLora(adapter=adapter)))
    with phase("write"):
        out.mkdir()
        write_safetensors(merged.weights, out / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    way, *paths = sys.argv[1:]
    phases = Phases()
    {"peft": by_peft, "optpass": by_optpass, "pass": by_pass}[way](*map(Path, paths), phases)
    print(json.dumps(phases.seconds))
