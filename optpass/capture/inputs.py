"""Example inputs of a model: declared by family, sized by its config, overridden by the user.

A builder maps a model's configuration to :class:`Inputs`: for every tensor its dimensions, fixed
ones as numbers and shared ones by name (``batch``, ``frames``), and for every name its default.
Giving one input's sizes thereby gives the named dimensions of all others. A family that is not here
is added by whoever needs it::

    @input_builder("MyVideoModel")
    def my_video_model(config):
        return Inputs(
            {"sample": Input(("batch", "frames", config["channels"], "height", "width")), "timestep": TIMESTEP},
            {"batch": 1, "frames": 8, "height": 32, "width": 32},
        )
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from optpass.capture.spans import Size, Sizes, Span, as_written, example_size, size_from
from optpass.errors import UserError, nearest
from optpass.ir.dimensions import Dimension
from optpass.ir.program import InputRange


@dataclass(frozen=True)
class Product:
    """A size that follows from named ones: their product times ``factor``, divided by ``divisor``.

    One of the names may be open, where the others make a whole multiple of it.
    """

    names: tuple[str, ...]
    factor: int = 1
    divisor: int = 1

    def of(self, sizes: Mapping[str, int]) -> int:
        """Its value."""
        return math.prod(sizes[name] for name in self.names) * self.factor // self.divisor

    def multiple(self, name: str, sizes: Mapping[str, int]) -> int:
        """How many times the size of ``name`` it is."""
        return self.of({**sizes, name: 1})

    def __str__(self) -> str:
        text = "·".join([*([str(self.factor)] if self.factor != 1 else []), *self.names])
        return text if self.divisor == 1 else f"{text}/{self.divisor}"


@dataclass(frozen=True)
class Number:
    """Where a constant argument holds a size itself: the named one, as a Python integer."""

    name: str


Dim = int | str | Product


@dataclass(frozen=True)
class Example:
    """What a model is captured with: nested ``arguments``, and which of their sizes stay open.

    ``places`` says for every input (by dotted name) which axis is which of the open ``dimensions``, and
    ``multiples`` which axis is how many times one of them.
    """

    arguments: Mapping[str, Any]
    dimensions: tuple[Dimension, ...] = ()
    places: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    multiples: Mapping[str, Mapping[int, tuple[str, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """One input tensor. ``dtype`` ``None`` is the dtype of the capture; no ``range`` means normal values."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype | None = None
    range: InputRange | None = None


@dataclass(frozen=True)
class Inputs:
    """All inputs of a model's forward.

    A dot in a name nests (``added_cond_kwargs.time_ids``; numbers make a tuple). ``sizes`` are the defaults
    of the named dimensions. ``constants`` are arguments that are no tensors; a :class:`Number` anywhere in
    them becomes the size of that name. ``steps`` says of which numbers a dimension must be a multiple: a
    capture with open sizes finds out by itself, and is quicker if told.
    """

    tensors: Mapping[str, Input]
    sizes: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def ranges(self) -> dict[str, InputRange]:
        return {name: tensor.range for name, tensor in self.tensors.items() if tensor.range}

    def arguments(self, overrides: Sizes, defaults: Mapping[str, int], dtype: torch.dtype) -> Example:
        """Nested keyword arguments of tensors on ``meta``: shape and dtype, no data.

        Raises:
            UserError: an override names no input, has another rank, or contradicts the model or another override.
        """
        sizes = {**self.sizes, **{k: v for k, v in defaults.items() if k in self.sizes}}
        given = _named_sizes(self.tensors, overrides, self.named)
        spans = {name: size for name, size in given.items() if isinstance(size, Span)}
        self._refuse_open(spans)
        fixed = {name: size for name, size in given.items() if isinstance(size, int)}
        sizes = _with_examples({**sizes, **fixed}, spans)
        arguments: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            shape = [_size(dim, sizes) for dim in tensor.dims]
            if any(isinstance(dim, Product) for dim in tensor.dims) and not _fits(shape, overrides.get(name, shape)):
                raise UserError(f"input {name!r} has {_dims(tensor.dims)}, here {shape}; got {list(overrides[name])}")
            value = torch.empty(shape, dtype=tensor.dtype or dtype, device="meta")
            _put(arguments, name.split("."), value)
        places = {
            name: {axis: dim for axis, dim in enumerate(tensor.dims) if dim in spans}
            for name, tensor in self.tensors.items()
        }
        steps = {name: self.steps.get(name, 1) for name in spans}
        dimensions = tuple(
            _dimension(name, span, steps[name], sizes[name], self.tensors) for name, span in spans.items()
        )
        nested = {**_tuples(arguments), **_numbered(dict(self.constants), sizes)}
        return Example(nested, dimensions, places, _multiples(self.tensors, spans, sizes))

    def _numbers(self) -> set[str]:
        return {leaf.name for leaf in tree_leaves(dict(self.constants)) if isinstance(leaf, Number)}

    @property
    def named(self) -> set[str]:
        """The names of the dimensions that some argument has."""
        dims = [dim for tensor in self.tensors.values() for dim in tensor.dims]
        products = {name for dim in dims if isinstance(dim, Product) for name in dim.names}
        return {dim for dim in dims if isinstance(dim, str)} | products | self._numbers()

    def _refuse_open(self, spans: Mapping[str, Span]) -> None:
        numbers = self._numbers()
        for name in spans:
            if name in numbers:
                raise UserError(
                    f"the model takes {name} as a number, which a graph cannot keep open; give a fixed size"
                )


Builder = Callable[[Mapping[str, Any]], Inputs]
BUILDERS: dict[str, Builder] = {}

TIMESTEP = Input((), torch.float32, InputRange(0.0, 1000.0, "uniform"))
"""A diffusion timestep as one number for the whole batch, as pipelines pass it."""

TIMESTEPS = Input(("batch",), torch.float32, InputRange(0.0, 1000.0, "uniform"))
"""A timestep for every element of the batch, where the model insists on that."""


def input_builder(*class_names: str) -> Callable[[Builder], Builder]:
    """Register a function that maps a model's configuration to its :class:`Inputs`, by class name."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(class_names, builder))
        return builder

    return register


def integers(dims: tuple[Dim, ...], below: int) -> Input:
    """An input of class or token numbers in [0, ``below``)."""
    return Input(dims, torch.int64, InputRange(0.0, float(below), "uniform"))


def given_inputs(module: nn.Module, sizes: Sizes) -> Inputs:
    """Inputs of a model that no builder knows: the user gave the sizes of all that it requires.

    Raises:
        UserError: a required argument is missing, or a name is no argument of ``forward``.
    """
    parameters = inspect.signature(module.forward).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in kinds]
    missing = [name for name in required if not any(key.split(".")[0] == name for key in sizes)]
    if missing or not sizes:
        raise UserError(
            f"optpass does not know the inputs of {type(module).__name__}: give the sizes of "
            f"{', '.join(missing) or 'its tensors'} with --inputs NAME=1x3x8x8, or register an @input_builder"
        )
    for name in sizes:
        if name.split(".")[0] not in parameters:
            raise UserError(f"{type(module).__name__} has no input {name!r}{nearest(name, parameters)}")
    tensors = {name: Input(tuple(f"{name}[{i}]" for i in range(len(shape)))) for name, shape in sizes.items()}
    defaults = {
        f"{name}[{axis}]": size if isinstance(size, int) else size.minimum
        for name, shape in sizes.items()
        for axis, size in enumerate(shape)
    }
    return Inputs(tensors, defaults)


def inputs_of_example(example: Mapping[str, Any]) -> Inputs:
    """Inputs like the tensors of ``example``, every dimension free; a leading size that all share is ``batch``.

    Integer ranges are those of the example's values.
    """
    tensors: dict[str, Tensor] = {}
    constants = {name: value for name, value in example.items() if not _collect(name, value, tensors)}
    leading = {tensor.shape[0] for tensor in tensors.values() if tensor.dim()}
    sizes = {"batch": leading.pop()} if len(leading) == 1 else {}
    inputs: dict[str, Input] = {}
    for name, tensor in tensors.items():
        dims = ["batch" if i == 0 and sizes.get("batch") else f"{name}[{i}]" for i in range(tensor.dim())]
        sizes |= dict(zip(dims, tensor.shape, strict=True))
        inputs[name] = Input(tuple(dims), tensor.dtype, _range_of(tensor))
    return Inputs(inputs, sizes, constants)


def _collect(name: str, value: Any, tensors: dict[str, Tensor]) -> bool:
    """Put the tensors of ``value`` (a tensor, or a dict of them) under their dotted names; whether it was one."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return True
    if isinstance(value, Mapping) and value:
        if not all(_collect(f"{name}.{key}", item, tensors) for key, item in value.items()):
            raise UserError(f"example input {name!r} mixes tensors with other values in one dict")
        return True
    return False


def _range_of(tensor: Tensor) -> InputRange | None:
    if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel() or tensor.is_meta:
        return None
    return InputRange(float(tensor.min()), float(tensor.max()) + 1, "uniform")


def _named_sizes(tensors: Mapping[str, Input], overrides: Sizes, named: set[str]) -> dict[str, Size]:
    """What ``overrides`` say about the dimensions that have a name; ``named`` are all of them."""
    found: dict[str, Size] = {}
    said_by: dict[str, str] = {}
    for name, shape in overrides.items():
        if name not in tensors and name not in named:
            known = [*tensors, *sorted(named)]
            raise UserError(f"the model has no input {name!r}{nearest(name, known)}")
        dims: tuple[Dim, ...] = tensors[name].dims if name in tensors else (name,)
        if len(shape) != len(dims):
            raise UserError(f"input {name!r} has {_dims(dims)}; {len(shape)} sizes are given: {as_written(shape)}")
        for dim, size in zip(dims, shape, strict=True):
            size = size if isinstance(size, Span) else size_from(size, f"input {name!r}")
            if isinstance(dim, int):
                if size != dim:
                    raise UserError(
                        f"input {name!r} has {_dims(dims)}, fixed by the model's config; got {as_written(shape)}"
                    )
            elif isinstance(dim, Product):
                continue  # follows from the named sizes, with which it is compared when all are known
            elif found.setdefault(dim, size) != size:
                raise UserError(f"inputs {said_by[dim]!r} and {name!r} disagree on {dim}: {found[dim]} and {size}")
            else:
                said_by.setdefault(dim, name)
    return found


def _with_examples(sizes: dict[str, int], spans: Mapping[str, Span]) -> dict[str, int]:
    """``sizes`` with an example for every open dimension, no two alike where their ranges allow it."""
    taken: set[int] = set()
    for name, span in spans.items():
        sizes[name] = example_size(span, sizes.get(name, span.minimum), taken)
        taken.add(sizes[name])
    return sizes


def _dimension(name: str, span: Span, step: int, example: int, tensors: Mapping[str, Input]) -> Dimension:
    """The open dimension ``name``, narrowed to multiples of ``step`` where the user named no step.

    Raises:
        UserError: no such size is in the range.
    """
    if span.step or step == 1:
        return Dimension(name, span.minimum, span.maximum, span.step or 1, example)
    low, high = -(-span.minimum // step) * step, span.maximum // step * step
    if low >= high:
        place = next(key for key, tensor in tensors.items() if name in tensor.dims)
        raise UserError(f"input {place!r}: {name} is a multiple of {step} in this model; {span} holds at most one")
    return Dimension(name, low, high, step, min(max(example // step * step, low), high))


def _dims(dims: tuple[Dim, ...]) -> str:
    return f"{len(dims)} dimensions ({', '.join(map(str, dims))})" if dims else "no dimensions"


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else dim.of(sizes) if isinstance(dim, Product) else sizes[dim]


def _multiples(
    tensors: Mapping[str, Input], spans: Mapping[str, Span], sizes: Mapping[str, int]
) -> dict[str, dict[int, tuple[str, int]]]:
    """The axes whose size follows from an open dimension: which one, and how many times it.

    Raises:
        UserError: a size follows from several open dimensions, or from a part of one.
    """
    found: dict[str, dict[int, tuple[str, int]]] = {}
    for name, tensor in tensors.items():
        for axis, dim in enumerate(tensor.dims):
            if not isinstance(dim, Product) or not (open_names := [item for item in dim.names if item in spans]):
                continue
            times = dim.multiple(open_names[0], sizes)
            if len(open_names) > 1 or times * sizes[open_names[0]] != dim.of(sizes):
                raise UserError(
                    f"input {name!r} has the size {dim}: of {', '.join(dim.names)} only one can stay open, "
                    "where the others make a whole multiple of it"
                )
            found.setdefault(name, {})[axis] = (open_names[0], times)
    return found


def _fits(shape: Sequence[int], given: Sequence[Size]) -> bool:
    return all(isinstance(size, Span) or size == found for found, size in zip(shape, given, strict=True))


def _numbered(value: Any, sizes: Mapping[str, int]) -> Any:
    return tree_map_only(Number, lambda number: sizes[number.name], value)


def _tuples(value: Any) -> Any:
    """Dicts whose keys count from 0 become the tuples that dotted names cannot spell."""
    if not isinstance(value, dict):
        return value
    items = {key: _tuples(item) for key, item in value.items()}
    return tuple(items.values()) if list(items) == [str(i) for i in range(len(items))] and items else items


def _put(arguments: dict[str, Any], path: list[str], value: Tensor) -> None:
    for key in path[:-1]:
        arguments = arguments.setdefault(key, {})
    arguments[path[-1]] = value
