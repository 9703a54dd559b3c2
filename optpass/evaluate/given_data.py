"""Data that users name: folders of tensors or images, and Python objects by import path; items as a model's inputs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from optpass.errors import UserError, nearest
from optpass.ir.graph import TensorSpec
from optpass.ir.interface import Interface
from optpass.ir.program import Program
from optpass.quiet import first_lines

TENSORS = (".pt", ".safetensors", ".npz", ".npy")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Indexed(Sequence[Any]):
    """Items that ``read`` gives by their number."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._read(number) for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._read(index % self._count)


def given_items(data: str, program: Program, call: Interface) -> Iterable[Any]:
    """What ``data`` holds: of a folder of tensors or images, or of ``module:name`` or ``file.py:name``, a dataset or
    what makes one. A Sequence where the items have numbers, else to be gone through once.

    A file of tensors holds one call's inputs by name, or a single tensor for a model of one input; so does an item
    of a dataset. Images become what the checkpoint's own preprocessor makes of them; where it has none, the
    model's size and the range −1 … 1.

    Raises:
        UserError: there is no such data; also while it is read.
    """
    if Path(data).exists():
        return _from_folder(Path(data), program, call)
    made = named_object(data, "data")
    if isinstance(made, type) or (callable(made) and not hasattr(made, "__getitem__")):
        made = made()
    if hasattr(made, "__len__") and hasattr(made, "__getitem__"):
        return Indexed(len(made), made.__getitem__)
    if isinstance(made, Iterable):
        return made
    raise UserError(f"data: {data} is a {type(made).__name__}, and neither a dataset nor iterable")


def named_object(path: str, option: str) -> Any:
    """What ``package.module:name`` or ``path/to/file.py:name`` names. Code that is named is run.

    Raises:
        UserError: there is no such module or name, or the import fails; the message begins with ``option``.
    """
    source, colon, name = path.rpartition(":")
    if not colon:
        what = "no folder, and no dataset" if option == "data" else "no function"
        raise UserError(f"{option}: {path!r} is {what} written as 'package.module:name' or 'file.py:name'")
    module = _file_module(Path(source), option) if source.endswith(".py") else _module(source, option)
    if not hasattr(module, name):
        raise UserError(f"{option}: {source} has no {name!r}{nearest(name, vars(module))}")
    return getattr(module, name)


def _module(name: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{option}: cannot import {name!r}: {error}") from error


def _file_module(path: Path, option: str) -> Any:
    if not path.is_file():
        raise UserError(f"{option}: no Python file at {path}")
    spec = importlib.util.spec_from_file_location(f"optpass_given_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is made.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{option}: {path} fails on import: {type(error).__name__}: {first_lines(error)}") from error
    return module


def _from_folder(folder: Path, program: Program, call: Interface) -> Sequence[Any]:
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    known = [path for path in files if path.suffix.lower() in (*TENSORS, *IMAGES)]
    if not known:
        raise UserError(f"data: {folder} has no file of {', '.join((*TENSORS, *IMAGES))}")
    images = _images(program, call) if any(path.suffix.lower() in IMAGES for path in known) else None

    def read(index: int) -> Any:
        path = known[index]
        try:
            is_image = images is not None and path.suffix.lower() in IMAGES
            return images(path) if is_image else _tensors(path)  # type: ignore[misc]
        # Each format has exceptions of its own for a damaged file.
        except Exception as error:
            raise UserError(f"data: cannot read {path}: {first_lines(error, 1)}") from error

    return Indexed(len(known), read)


def _tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
        return torch.from_numpy(loaded)
    return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


def _images(program: Program, call: Interface) -> Any:
    """What makes an input of an image file."""
    from PIL import Image

    specs = [spec for spec in call.inputs_at() if len(spec.shape) == 4 and spec.shape[1] in (1, 3)]
    if len(specs) != 1 or len(call.inputs) != 1:
        raise UserError("data: images serve models of one image input; give files of tensors by name")
    (spec,) = specs
    folder = program.origin.path
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder)
        return lambda path: processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]

    def read(path: Path) -> Tensor:
        mode = "L" if spec.shape[1] == 1 else "RGB"
        image = Image.open(path).convert(mode).resize((spec.shape[3], spec.shape[2]))
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1)
        return pixels.reshape(1, *spec.shape[2:], spec.shape[1]).movedim(-1, 1)

    return read


def bound(item: Any, call: Interface, where: str) -> dict[str, Tensor]:
    """``item`` as the call's inputs by name; where it has no batch, it is one of 1.

    Raises:
        UserError: inputs are missing, do not fit, or hold NaN or Inf.
    """
    specs = {spec.name: spec for spec in call.inputs}
    if isinstance(item, (tuple, list)):
        item = dict(zip(specs, item, strict=False))
    elif isinstance(item, (Tensor, np.ndarray)):
        item = dict(zip(specs, [item], strict=False))
    if not isinstance(item, Mapping):
        raise UserError(f"data: {where} is a {type(item).__name__}, and not inputs by name")
    if missing := [name for name in specs if name not in item]:
        raise UserError(f"data: {where} has no {missing[0]!r}{nearest(missing[0], map(str, item))}")
    return {name: _fitting(item[name], spec, f"{where} has {name}") for name, spec in specs.items()}


def _fitting(given: Any, spec: TensorSpec, what: str) -> Tensor:
    try:
        value = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data: {what} of type {type(given).__name__}, and not a tensor") from error
    if value.ndim == len(spec.shape) - 1:
        value = value.unsqueeze(0)
    fixed = [(size, own) for size, own in zip(value.shape, spec.shape, strict=False) if isinstance(own, int)]
    if value.ndim != len(spec.shape) or any(size != own for size, own in fixed):
        sizes = ", ".join(map(str, spec.shape))
        raise UserError(f"data: {what} of shape {list(value.shape)}, and the model takes [{sizes}]")
    if value.is_floating_point() and not value.isfinite().all():
        raise UserError(f"data: {what} with NaN or Inf in it")
    return value.to(spec.dtype)
