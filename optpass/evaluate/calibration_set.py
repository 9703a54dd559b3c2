"""Calibration sets: what every entry of a Program is called with, while its pipeline, a dataset or chance drives it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optpass.errors import UserError, nearest
from optpass.evaluate.difference import program_calls, program_runners
from optpass.evaluate.trials import random_inputs
from optpass.evaluate.walks import period, walk
from optpass.ir.graph import TensorSpec
from optpass.ir.hashing import tensor_digest
from optpass.ir.interface import Interface
from optpass.ir.program import Program
from optpass.pipeline.target import Runner
from optpass.quiet import first_lines
from optpass.runtime.folder import build_pipeline
from optpass.runtime.loop import call_runners
from optpass.runtime.looped import engine_module
from optpass.runtime.sampling import Asked, drive

Call = Mapping[str, Tensor]
TENSORS = (".pt", ".safetensors", ".npz", ".npy")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class CalibrationSet:
    """What each entry was called with, by name, at most so many calls evenly spaced; where that came from."""

    entries: Mapping[str, Sequence[Call]]
    source: str

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all tensors, in order."""
        found = hashlib.sha256()
        for name, calls in sorted(self.entries.items()):
            for call in calls:
                for key in sorted(call):
                    found.update(f"{name}/{key}/{tensor_digest(call[key])};".encode())
        return found.hexdigest()

    def split(self, count: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Without ``count`` calls of each entry, evenly spaced; those alone. An entry's only call is in both."""
        kept, held = {}, {}
        for name, calls in self.entries.items():
            number = min(count, len(calls) - 1)
            apart = {round((index + 0.5) * len(calls) / number - 0.5) for index in range(number)}
            held[name] = [call for index, call in enumerate(calls) if index in apart] or list(calls)
            kept[name] = [call for index, call in enumerate(calls) if index not in apart]
        return CalibrationSet(kept, self.source), CalibrationSet(held, self.source)


@dataclass
class _Thinned:
    """Items of a stream of unknown length, evenly spaced: of twice as many as asked for, every other goes."""

    count: int
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, call: Call) -> None:
        if self._seen % self._stride == 0:
            # A pipeline may write into what it gave.
            self.kept.append({name: value.detach().clone() for name, value in call.items()})
        self._seen += 1
        if len(self.kept) == 2 * self.count:
            self.kept = self.kept[::2]
            self._stride *= 2

    def calls(self) -> list[dict[str, Tensor]]:
        places = torch.linspace(0, len(self.kept) - 1, min(self.count, len(self.kept))).round().int().tolist()
        return [self.kept[place] for place in places]


class _Watched:
    """A Program's entries, executed by PyTorch, with note of what they are called with."""

    def __init__(self, program: Program, count: int) -> None:
        self._seen = {name: _Thinned(count) for name in program.entries}
        self.runners = {name: self._noting(name, runner) for name, runner in program_runners(program).items()}

    def _noting(self, name: str, runner: Runner) -> Runner:
        def run(tensors: Call) -> dict[str, Tensor]:
            self._seen[name].add(tensors)
            return runner(tensors)

        return run

    def found(self, source: str) -> CalibrationSet:
        """
        Raises:
            UserError: an entry was never called.
        """
        entries = {name: seen.calls() for name, seen in self._seen.items()}
        if idle := [name for name, calls in entries.items() if not calls]:
            raise UserError(f"calibration never ran the entry {idle[0]!r}: give more samples or more steps")
        return CalibrationSet(entries, source)


def sampled_set(program: Program, folder: Path, asked: Asked, *, count: int, samples: int, seed: int) -> CalibrationSet:
    """What the pipeline in ``folder`` calls every entry with, over all timesteps, while it generates ``samples``.

    Raises:
        UserError: the pipeline's call needs something that ``asked`` has not.
    """
    watched = _Watched(program, count)
    pipeline = build_pipeline(folder, {program.origin.component: engine_module(program, watched.runners)})
    drive(pipeline, samples=samples, asked=asked, seed=seed)
    return watched.found(f"{samples} samples of the pipeline in {asked.steps} steps")


def random_set(program: Program, *, count: int, seed: int) -> CalibrationSet:
    """Random calls in the ranges of the inputs; of a loop, walks through its schedule."""
    watched = _Watched(program, count)
    for name, call in program_calls(program).items():
        run = call_runners(program, watched.runners)[name]
        for inputs in islice(_random_calls(program, call, seed), count):
            run(inputs)
    return watched.found("random inputs")


def given_set(program: Program, data: str, *, count: int) -> CalibrationSet:
    """Calls from ``data``: a folder of tensors or images, or ``module:name`` of a dataset (or of what makes one).

    A file of tensors holds one call's inputs by name, or a single tensor for a model of one input; so does an item
    of a dataset. Images become what the checkpoint's own preprocessor makes of them; where it has none, the
    model's size and the range −1 … 1.

    Raises:
        UserError: there is no such data, or it does not fit the model's inputs.
    """
    calls = program_calls(program)
    if len(calls) > 1:
        raise UserError("the model has several calls, and a dataset is of one: calibrate components one by one")
    ((name, call),) = calls.items()
    watched = _Watched(program, count)
    run = call_runners(program, watched.runners)[name]
    items = _from_folder(Path(data), program, call) if Path(data).exists() else _from_object(data)
    index = -1
    for index, item in enumerate(islice(items, count)):
        run(_bound(item, call, f"{data}, item {index}"))
    if index < 0:
        raise UserError(f"data: {data} has no item")
    return watched.found(data)


def _random_calls(program: Program, call: Interface, seed: int) -> Iterator[Call]:
    loop, index = program.loop, 0
    while True:
        if loop is None or loop.stateless:
            yield random_inputs(call.inputs_at(), program.ranges, seed + index)
        else:
            yield from walk(loop, call.inputs_at(), program.ranges, seed + index, period(loop))
        index += 1


def _from_object(data: str) -> Iterator[Any]:
    module, colon, name = data.partition(":")
    if not colon:
        raise UserError(f"data: {data!r} is no folder, and no dataset written as 'package.module:name'")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"data: cannot import {module!r}: {error}") from error
    if not hasattr(found, name):
        raise UserError(f"data: {module} has no {name!r}{nearest(name, vars(found))}")
    value = getattr(found, name)
    made = value() if callable(value) and not hasattr(value, "__getitem__") else value
    if hasattr(made, "__len__") and hasattr(made, "__getitem__"):
        return (made[index] for index in range(len(made)))
    if isinstance(made, Iterable):
        return iter(made)
    raise UserError(f"data: {data} is a {type(made).__name__}, and neither a dataset nor iterable")


def _from_folder(folder: Path, program: Program, call: Interface) -> Iterator[Any]:
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    known = [path for path in files if path.suffix.lower() in (*TENSORS, *IMAGES)]
    if not known:
        raise UserError(f"data: {folder} has no file of {', '.join((*TENSORS, *IMAGES))}")
    images = _images(program, call) if any(path.suffix.lower() in IMAGES for path in known) else None
    for path in known:
        try:
            is_image = images is not None and path.suffix.lower() in IMAGES
            item = images(path) if is_image else _tensors(path)  # type: ignore[misc]
        # Each format has exceptions of its own for a damaged file.
        except Exception as error:
            raise UserError(f"data: cannot read {path}: {first_lines(error, 1)}") from error
        yield item


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


def _bound(item: Any, call: Interface, where: str) -> dict[str, Tensor]:
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
