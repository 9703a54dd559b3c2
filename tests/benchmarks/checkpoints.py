"""Checkpoints of full size with random float16 weights, written one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from optpass.ir.safetensors_io import write_safetensors
from optpass.ir.weights import Expression, Shape

STEM = "diffusion_pytorch_model"
BLOCK = 1 << 24
"""Values drawn; every tensor is a stretch of them, from an offset of its own."""
STEP = 7919


@dataclass(frozen=True, eq=False)
class Drawn(Expression):
    """Normal values of standard deviation 0.02, float16."""

    values: Tensor
    offset: int
    shape: Shape
    dtype: torch.dtype = torch.float16

    def evaluate(self) -> Tensor:
        count, start = self.numel, self.offset % BLOCK
        repeats = -(-(start + count) // BLOCK)
        flat = self.values if repeats == 1 else self.values.repeat(repeats)
        return flat[start : start + count].reshape(self.shape)

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"drawn({self.offset})"


def write_checkpoint(config: Path, folder: Path, *, shard_bytes: int | None = None, seed: int = 0) -> int:
    """A diffusers model folder of ``config`` with random weights; in shards with an index if ``shard_bytes``.

    Returns the bytes of its weight files.
    """
    folder.mkdir(parents=True)
    shutil.copy(config / "config.json", folder)
    values = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)) * 0.02).half()
    weights: dict[str, Expression] = {
        name: Drawn(values, index * STEP, shape) for index, (name, shape) in enumerate(shapes(config).items())
    }
    if shard_bytes is None:
        write_safetensors(weights, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(weights, folder, shard_bytes)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shapes(config: Path) -> dict[str, Shape]:
    """Names and shapes of the model's parameters, none of them made."""
    import diffusers

    with torch.device("meta"):
        settings = json.loads((config / "config.json").read_text())
        model = getattr(diffusers, settings["_class_name"]).from_config(settings)
    return {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}


def _write_shards(weights: Mapping[str, Expression], folder: Path, shard_bytes: int) -> None:
    shards = list(_shards(weights, shard_bytes))
    table = {}
    for number, names in enumerate(shards, 1):
        shard = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors({name: weights[name] for name in names}, folder / shard, metadata={"format": "pt"})
        table |= dict.fromkeys(names, shard)
    total = sum(2 * prod(expression.shape) for expression in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def _shards(weights: Mapping[str, Expression], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, expression in weights.items():
        if names and size + expression.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += expression.nbytes
    yield names
