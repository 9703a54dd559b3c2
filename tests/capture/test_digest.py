"""The checkpoint's identity: what counts, and that nothing is read twice for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optpass.capture.digest import checkpoint_digest, identified
from optpass.capture.sources import capture
from optpass.ir.safetensors_io import Stored, write_safetensors
from optpass.ir.weights import Cast, Concat, Scale, Select

WEIGHTS = "diffusion_pytorch_model.safetensors"


def sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The same weights in two shards with an index, in another order."""
    names = sorted(tensors, reverse=True)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    table = {}
    for index, half in enumerate(halves):
        shard = f"part-{index}.safetensors"
        save_file({name: tensors[name] for name in half}, folder / shard)
        table |= dict.fromkeys(half, shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))


def test_shards_and_a_single_file_of_one_model_are_one_checkpoint(unet_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((unet_folder / "config.json").read_bytes())
    tensors = load_file(unet_folder / WEIGHTS)
    sharded(tmp_path, tensors)
    assert checkpoint_digest(capture(tmp_path)) == checkpoint_digest(capture(unet_folder))
    sharded(tmp_path, {**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1})
    assert checkpoint_digest(capture(tmp_path)) != checkpoint_digest(capture(unet_folder))


def test_exchanged_tensors_and_another_dtype_are_another_checkpoint(unet_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((unet_folder / "config.json").read_bytes())
    tensors = load_file(unet_folder / WEIGHTS)
    bias, norm = "conv_norm_out.bias", "conv_norm_out.weight"
    save_file({**tensors, bias: tensors[norm], norm: tensors[bias]}, tmp_path / WEIGHTS)
    first = checkpoint_digest(capture(unet_folder))
    assert checkpoint_digest(capture(tmp_path)) != first
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / WEIGHTS)
    assert checkpoint_digest(capture(tmp_path, dtype=torch.float32)) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_written_is_not_read_again(
    dtype: torch.dtype, unet_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    evaluate = Stored.evaluate

    def counted(leaf: Stored) -> Tensor:
        reads[leaf.key] += 1
        return evaluate(leaf)

    monkeypatch.setattr(Stored, "evaluate", counted)
    program = identified(capture(unet_folder, dtype=dtype))
    assert any(isinstance(e, Cast) for e in program.weights.values()) == (dtype == torch.float16)
    dropped = "conv_out.weight"
    kept = {name: expression for name, expression in program.weights.items() if name != dropped}
    write_safetensors(kept, tmp_path / "x")
    assert dropped not in reads
    digest = program.origin.as_json()["sha256"]
    assert set(reads.values()) == {1}
    assert reads.keys() == program.weights.keys()
    assert digest == checkpoint_digest(capture(unet_folder, dtype=dtype))


def test_leaves_under_any_expression_are_hashed_when_they_are_read(unet_folder: Path, tmp_path: Path) -> None:
    program = capture(unet_folder)
    first, second = (program.weights[f"conv_norm_out.{end}"] for end in ("weight", "bias"))
    joined = Scale(Concat((Select(first, 0, (1, 0)), second), 0), 2.0)
    program = program.with_weights({"conv_norm_out.weight": Select(joined, 0, tuple(range(8)))})
    watched = identified(program)
    found, expected = (each.weights["conv_norm_out.weight"].evaluate() for each in (watched, program))
    assert torch.equal(found, expected)
    identity: Any = watched.origin.digest
    assert {name for _, name in identity._hashes} == {"conv_norm_out.weight", "conv_norm_out.bias"}
