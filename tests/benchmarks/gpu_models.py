"""The denoisers of the GPU benchmark: full size with random weights, and small ones of the same make for the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Model:
    """A denoiser: its configuration (``config`` of the repository, and ``changes`` to it), the sizes of its inputs.

    ``caching`` is the pass that caches in it, ``peer`` the loader of :mod:`gpu_peers` that does the same in eager
    PyTorch with ``peer_options``, both recomputing everything at one step of ``every``.
    """

    config: str
    inputs: Mapping[str, Sequence[int]]
    caching: Mapping[str, Any]
    peer: str
    peer_options: Mapping[str, Any]
    every: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    precisions: Sequence[str] = ("fp32", "tf32", "bf16", "int8")

    def write(self, folder: Path) -> int:
        """A checkpoint in ``folder``; the bytes of its weights, which are float16."""
        settings = {**json.loads((CONFIGS / self.config / "config.json").read_text("utf-8")), **self.changes}
        source = folder.with_name(f"{folder.name}.config")
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(settings), "utf-8")
        return write_checkpoint(source, folder)


def _cut(path: str, every: int) -> dict[str, Any]:
    return {"cache-features": {"cut": path, "every": every}}


BLOCKS = {"cache-blocks": {"method": "interval", "every": 2, "head": 1}}
OUTERMOST = {"branch": 0, "every": 3}
"""DeepCache's branch 0, and what its paper calls N."""

FULL: Mapping[str, Model] = {
    "SD 1.5": Model(
        "sd15-unet", {"sample": (2, 4, 64, 64)}, _cut("up_blocks.3.attentions.1", 3), "deepcache", OUTERMOST, 3
    ),
    "SVD": Model(
        "svd-unet", {"sample": (2, 14, 8, 72, 128)}, _cut("up_blocks.3.attentions.1", 3), "deepcache", OUTERMOST, 3
    ),
    # 12 billion parameters: 48 GB in float32.
    "Flux": Model("flux-transformer", {}, BLOCKS, "cache_dit", {"every": 2}, 2, precisions=("bf16", "int8")),
}
TWO_LEVELS: Mapping[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "sample_size": 16,
}
TINY: Mapping[str, Model] = {
    "SD 1.5": Model(
        "sd15-unet",
        {"sample": (2, 4, 16, 16)},
        _cut("up_blocks.1.attentions.0", 3),
        "deepcache",
        OUTERMOST,
        3,
        {
            **TWO_LEVELS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
        },
    ),
    "Flux": Model(
        "flux-transformer",
        {},
        BLOCKS,
        "cache_dit",
        {"every": 2},
        2,
        {
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
        },
        precisions=("bf16", "int8"),
    ),
}
SIZES: Mapping[str, Mapping[str, Model]] = {"full": FULL, "tiny": TINY}
