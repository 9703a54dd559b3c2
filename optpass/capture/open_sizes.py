"""torch.export with open sizes: ranges declared before tracing, and what the model asks of them found out.

torch.export takes a range only if the model works for all of it; a UNet that halves its input takes
multiples. A refused range is traced once more with nothing declared, the guards that leaves behind are tried
on every size of the range, and the range is declared again in the steps that passed. What guards ask beyond
ranges (relations of two dimensions) is kept for the engine to check at every call.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from optpass.capture.inputs import Example
from optpass.capture.unit_sizes import at_one, same_operators, squeezed
from optpass.errors import UserError
from optpass.ir.dimensions import Dimension, Dimensions
from optpass.ir.guards import Guard, identifier
from optpass.ir.signature import named_leaves
from optpass.ir.sizes import oblivious, sizes_of
from optpass.quiet import first_lines

Export = Callable[[Example, dict[str, Any] | None], ExportedProgram]
"""Exports the module for an example with the given ``dynamic_shapes``."""

SIZE_IN_GUARD = re.compile(r"L((?:\['\w+'\])+)\.size\(\)\[(\d+)\]")
TRIED = 1 << 16
"""Sizes of a range that guards are tried on."""


def export_open(module: nn.Module, example: Example, export: Export) -> tuple[ExportedProgram, Dimensions]:
    """Export with the open dimensions of ``example``; they come back with their steps and symbols.

    Raises:
        UserError: the model fixes a dimension that should stay open, or works for a part of its range only.
    """
    name = type(module).__name__
    with oblivious(), _tied(module, example):
        try:
            found = _attempt(name, example, export)
        except Exception:
            # Not only refusals: with nothing declared, torch.export no longer knows that two inputs share a size.
            if widened := _with_ones(name, example, export):
                return _whole(name, *widened)
            raise
        return _whole(name, *((_with_ones(name, example, export, found) if found[1].guards else None) or found))


def _whole(name: str, exported: ExportedProgram, dimensions: Dimensions) -> tuple[ExportedProgram, Dimensions]:
    """
    Raises:
        UserError: a guard takes sizes out of a dimension's range, or the model drops the dimension when it is 1.
    """
    guards = [Guard(text) for text in dimensions.guards]
    for item in dimensions:
        if (taken := _stepped(name, item, guards)) != item:
            raise UserError(f"{name} takes {item.name} at {taken}, not at {item}; give the steps with the range")
        if item.minimum == 1 and squeezed(exported, item.symbol):
            raise UserError(
                f"{name} returns other dimensions when {item.name} is 1 (it squeezes them); let the range begin at 2"
            )
    return exported, dimensions


@contextmanager
def _tied(module: nn.Module, example: Example) -> Iterator[None]:
    """One dimension's sizes taken for equal before the model computes with them; torch.export checks it only after.

    Unequal, a view of one input by the batch of another has a size that meets nothing.
    """

    def tie(_: nn.Module, args: Any, arguments: Any) -> None:
        sizes: dict[str, Any] = {}
        for path, axes in example.places.items():
            for axis, dim in axes.items():
                size = _argument(arguments, path).shape[axis]
                torch._check(size == sizes.setdefault(dim, size))  # type: ignore[no-untyped-call]
        for path, multiples in example.multiples.items():
            for axis, (dim, count) in multiples.items():
                torch._check(_argument(arguments, path).shape[axis] == count * sizes[dim])  # type: ignore[no-untyped-call]

    handle = module.register_forward_pre_hook(tie, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _argument(arguments: Any, path: str) -> Any:
    for key in path.split("."):
        arguments = arguments[key] if isinstance(arguments, Mapping) else arguments[int(key)]
    return arguments


def _attempt(name: str, example: Example, export: Export) -> tuple[ExportedProgram, Dimensions]:
    dimensions = example.dimensions
    try:
        exported = export(example, _shapes(example, _declared(dimensions)))
    except torch._dynamo.exc.UserError as refusal:
        dimensions = _learned(name, example, export, refusal)
        try:
            exported = export(example, _shapes(example, _declared(dimensions)))
        except torch._dynamo.exc.UserError as error:
            raise UserError(f"{name} cannot keep {_listed(dimensions)} open: {_reason(error)}") from error
    found = tuple(replace(item, symbol=_symbol(item, example, exported, name)) for item in dimensions)
    return exported, Dimensions(found, tuple(_remaining(found, _guards(exported, example))))


def _with_ones(
    name: str, example: Example, export: Export, found: tuple[ExportedProgram, Dimensions] | None = None
) -> tuple[ExportedProgram, Dimensions] | None:
    """The export for ranges that begin at 2, widened to 1; ``None`` where 1 is not what was in the way.

    ``found`` is what the whole ranges gave, if anything; its guards are then held against the narrowed ranges.
    """
    ones = {item.name: item for item in example.dimensions if item.minimum == 1 and item.step == 1}
    if not ones:
        return None
    narrowed = replace(example, dimensions=tuple(_from_two(item, ones) for item in example.dimensions))
    try:
        exported, dimensions = found or _attempt(name, narrowed, export)
    except Exception:
        return None
    items = [_from_two(item, ones) for item in dimensions]
    guards = tuple(_remaining(items, [Guard(text) for text in dimensions.guards]))
    if found is not None and guards == dimensions.guards:
        return None
    if any(item.step != 1 for item in items if item.name in ones):
        return None
    stepped = replace(example, dimensions=tuple(items))
    if not all(_same_at_one(stepped, dim, export, exported) for dim in ones):
        return None
    whole = [replace(ones[item.name], symbol=item.symbol) if item.name in ones else item for item in items]
    return exported, Dimensions(tuple(whole), guards)


def _from_two(item: Dimension, ones: Mapping[str, Dimension]) -> Dimension:
    # A range of one size is no range to torch.export.
    return replace(item, minimum=2, maximum=max(item.maximum, 3)) if item.name in ones else item


def _same_at_one(example: Example, name: str, export: Export, exported: ExportedProgram) -> bool:
    fixed = at_one(example, name)
    try:
        return same_operators(exported, export(fixed, _shapes(fixed, _declared(fixed.dimensions))))
    except torch._dynamo.exc.UserError:
        return False


def _declared(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """torch's own dimension for each of ours: step · symbol + offset."""
    found: dict[str, Any] = {}
    for index, item in enumerate(dimensions):
        if item.step == 1:
            found[item.name] = Dim(f"dim{index}", min=item.minimum, max=item.maximum)
        else:
            symbol = Dim(f"dim{index}", min=item.minimum // item.step, max=item.maximum // item.step)
            found[item.name] = item.step * symbol + item.offset if item.offset else item.step * symbol
    return found


def _shapes(example: Example, declared: Mapping[str, Any]) -> dict[str, Any]:
    """``dynamic_shapes`` for every argument, nested as the arguments are."""

    def shapes(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: shapes(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(shapes(item, f"{path}.{index}") for index, item in enumerate(value))
        if not isinstance(value, Tensor):
            return None
        named = {axis: declared[dim] for axis, dim in example.places.get(path, {}).items()}
        multiples = example.multiples.get(path, {})
        named |= {axis: _times(declared[dim], count) for axis, (dim, count) in multiples.items()}
        return named or None

    return {key: shapes(value, key) for key, value in example.arguments.items()}


def _times(declared: Any, count: int) -> Any:
    # What torch finds out by itself (Dim.AUTO) has no arithmetic.
    return count * declared if isinstance(declared, Dim) else declared


def _learned(
    name: str, example: Example, export: Export, refusal: torch._dynamo.exc.UserError
) -> tuple[Dimension, ...]:
    """The dimensions in the steps that the model's guards ask for, from an export that declares no range.

    Raises:
        UserError: a dimension is fixed by the model, or its range cannot be had in equal steps.
    """
    exported = export(example, _shapes(example, {item.name: Dim.AUTO for item in example.dimensions}))
    fixed = [item for item in example.dimensions if isinstance(_size(item, example, exported), int)]
    if fixed:
        raise UserError(
            f"{name} cannot keep {_listed(fixed)} open: the model's code fixes "
            f"{', '.join(f'{item.name} at {_size(item, example, exported)}' for item in fixed)}; give "
            f"{'it' if len(fixed) == 1 else 'them'} a fixed size"
        )
    guards = _guards(exported, example)
    learned = tuple(_stepped(name, item, guards) for item in example.dimensions)
    if learned == example.dimensions:
        raise UserError(f"{name} cannot keep {_listed(learned)} open: {_reason(refusal)}") from refusal
    return learned


def _stepped(name: str, item: Dimension, guards: Sequence[Guard]) -> Dimension:
    """``item`` in the steps that pass every guard that concerns it alone."""
    known = identifier(item.name)
    own = [guard for guard in guards if guard.names == {known}]
    if not own:
        return item
    sizes = range(item.minimum, min(item.maximum, item.minimum + TRIED) + 1, item.step)
    passed = [size for size in sizes if all(guard.holds({known: size}) for guard in own)]
    gaps = {b - a for a, b in itertools.pairwise(passed)}
    if len(gaps) != 1:
        sample = ", ".join(map(str, passed[:6])) or "none"
        raise UserError(f"{name} takes only some sizes of {item.name} from {item}: {sample}; give a fixed size")
    step = gaps.pop()
    last = passed[-1] if item.maximum <= sizes[-1] + item.step - 1 else item.maximum - (item.maximum - passed[0]) % step
    if passed[0] - item.minimum >= step or item.maximum - last >= step:
        raise UserError(f"{name} takes {item.name} from {passed[0]} to {last}, not {item}; narrow the range")
    return replace(item, minimum=passed[0], maximum=last, step=step)


def _guards(exported: ExportedProgram, example: Example) -> list[Guard]:
    """What export left behind, over the names of open dimensions; guards on anything but sizes are left out."""
    found = []
    for code in getattr(exported, "_guards_code", None) or ():
        text = SIZE_IN_GUARD.sub(lambda size: _named_size(size, example), code)
        try:
            found.append(Guard(text))
        except UserError:
            continue
    return found


def _named_size(match: re.Match[str], example: Example) -> str:
    keys, axis = re.findall(r"\w+", match[1]), int(match[2])
    if (dim := example.places.get(".".join(keys), {}).get(axis)) is not None:
        return identifier(dim)
    if (multiple := example.multiples.get(".".join(keys), {}).get(axis)) is not None:
        return f"({multiple[1]}*{identifier(multiple[0])})"
    value: Any = example.arguments
    for key in keys:
        value = value[key] if key in value else value[int(key)]
    return str(int(value.shape[axis]))


def _remaining(dimensions: Sequence[Dimension], guards: Sequence[Guard]) -> list[str]:
    """The guards that some sizes in the declared ranges break."""
    named = {identifier(item.name): item for item in dimensions}
    found = []
    for guard in guards:
        names = sorted(guard.names & named.keys())
        grid = itertools.product(*(named[name].samples() for name in names))
        if not all(guard.holds(dict(zip(names, sizes, strict=True))) for sizes in grid):
            found.append(guard.text)
    return list(dict.fromkeys(found))


def _symbol(item: Dimension, example: Example, exported: ExportedProgram, name: str) -> str:
    """The symbol that stands for ``item`` in the exported shapes.

    Raises:
        UserError: the model has tied it to another dimension or fixed it.
    """
    size = _size(item, example, exported)
    symbols = [] if isinstance(size, int) else list(size.free_symbols)
    if len(symbols) != 1:
        raise UserError(f"{name} cannot keep {item.name} open: its size became {size}; give it a fixed size")
    return str(symbols[0])


def _size(item: Dimension, example: Example, exported: ExportedProgram) -> Any:
    """The exported size of ``item`` at the first input that has it."""
    path, axis = next(
        (path, axis) for path, axes in example.places.items() for axis, dim in axes.items() if dim == item.name
    )
    return sizes_of(_user_inputs(exported, example)[path])[axis]


def _user_inputs(exported: ExportedProgram, example: Example) -> dict[str, Tensor]:
    """The exported fake tensors by dotted input name, in the order that arguments flatten to."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    leaves = [values[spec.arg.name] for spec in exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    names = [name for name, _ in named_leaves(example.arguments)]
    return dict(zip(names, leaves, strict=True))


def _listed(dimensions: Sequence[Dimension]) -> str:
    return ", ".join(item.name for item in dimensions)


def _reason(error: BaseException) -> str:
    return inspect.cleandoc(first_lines(error, 4)).split("Suggested fixes")[0].strip()
