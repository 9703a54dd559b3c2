"""The weight files of a checkpoint folder → lazy expressions by name. No value is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optpass.errors import UserError, WeightError
from optpass.interchange.pickled import read_pickled
from optpass.ir.safetensors_io import read_safetensors
from optpass.ir.weights import Expression
from optpass.untrusted import inside, read_json

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16", ".bf16")
SAFE = ".safetensors"
PICKLED = (".bin", ".pth", ".pt", ".ckpt")
INDEX = ".index.json"
NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"})
"""What trainers leave beside the weights under a weight file's suffix."""

SHOWN = 5


def folder_weights(folder: Path) -> dict[str, Expression] | None:
    """The weights in a model folder; ``None`` when it has no weight file at all.

    Full precision goes before a half-precision variant, safetensors before pickles, an index of shards
    before a single file.

    Raises:
        UserError: several files could be the weights, or the index leaves the folder.
        WeightError: a file is damaged or incomplete, or a shard is missing.
    """
    found = weight_file(folder)
    if found is None:
        return None
    return given_weights(found)


def given_weights(path: Path) -> dict[str, Expression]:
    """The weights in a file, or in the shards of an index.

    Raises:
        UserError, WeightError: as :func:`read_weights` and :func:`read_index`.
    """
    return read_index(path) if path.suffix == ".json" else read_weights(path)


def weight_file(folder: Path) -> Path | None:
    """The file (or index of shards) that holds a model folder's weights.

    Raises:
        UserError: no file has a known name and several could be meant.
    """
    if not folder.is_dir():
        return None
    names = {entry.name for entry in folder.iterdir() if not entry.is_dir()} - NOT_WEIGHTS
    for name in _known_names():
        if name in names:
            return folder / name
    for suffix in (SAFE, *PICKLED):
        others = sorted(name for name in names if name.endswith(suffix))
        if len(others) > 1:
            listed = ", ".join(others[:SHOWN])
            raise UserError(f"{folder} holds several weight files ({listed}) and no index; choose one with --weights")
        if others:
            return folder / others[0]
    return None


def _known_names() -> list[str]:
    names: list[str] = []
    for variant in VARIANTS:
        for suffix in (SAFE, ".bin"):
            # Both spellings occur: model.safetensors.index.fp16.json and model.fp16.safetensors.index.json
            for stem in STEMS:
                names.append(f"{stem}{suffix}.index{variant}.json")
                names.append(f"{stem}{variant}{suffix}{INDEX}")
                names.append(f"{stem}{variant}{suffix}")
    return list(dict.fromkeys(names))


def read_weights(path: Path) -> dict[str, Expression]:
    """Lazy leaves over one weight file, safetensors or pickled (weights only).

    Raises:
        UserError: the suffix belongs to no weight format.
        WeightError: the file is damaged, or pickles something else than tensors.
    """
    if path.suffix == SAFE:
        return read_safetensors(path)
    if path.suffix in PICKLED:
        return read_pickled(path)
    raise UserError(f"{path}: weights come as {', '.join((SAFE, *PICKLED))}, not {path.suffix or 'without a suffix'!r}")


def read_index(path: Path) -> dict[str, Expression]:
    """The weights of an index of shards, each name checked to be where the index says.

    A tensor that a shard holds and the index does not list is a weight too, as it is to the libraries
    that load such folders. Where several shards hold a name, the index says which one counts.

    Raises:
        UserError: a shard's name leaves the folder.
        WeightError: the index is damaged, a shard is missing or damaged or lacks a tensor, or several
            shards hold a name that the index does not list.
    """
    table = read_json(path).get("weight_map")
    if not isinstance(table, Mapping) or not all(isinstance(shard, str) for shard in table.values()):
        raise WeightError(f"{path} is damaged: 'weight_map' does not map tensor names to shard files")
    shards: dict[str, dict[str, Expression]] = {}
    for shard in dict.fromkeys(table.values()):
        file = inside(path.parent, shard, path)
        if not file.is_file():
            raise WeightError(f"{path.name} names the shard {shard!r}, which is missing from {path.parent}")
        shards[shard] = read_weights(file)
    for name, shard in table.items():
        if name not in shards[shard]:
            raise WeightError(f"{path.parent / shard} lacks the tensor {name!r}, which {path.name} promises")
    return {**_unlisted(path, table, shards), **{name: shards[shard][name] for name, shard in table.items()}}


def _unlisted(
    path: Path, table: Mapping[str, str], shards: Mapping[str, Mapping[str, Expression]]
) -> dict[str, Expression]:
    found: dict[str, Expression] = {}
    holder: dict[str, str] = {}
    for shard, tensors in shards.items():
        for name, tensor in tensors.items():
            if name in table:
                continue
            if name in found:
                raise WeightError(
                    f"{holder[name]} and {shard} both hold {name!r}, and {path.name} does not say which one counts"
                )
            found[name], holder[name] = tensor, shard
    return found
