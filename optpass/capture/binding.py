"""Weights of a captured graph → leaves of the checkpoint: names, ties, shapes, dtypes, all checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optpass.errors import WeightError, nearest
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.ir.weights import Absent, Cast, Constant, Expression, WeightStore, dtype_name

SHOWN = 5


def bind(
    graph: Graph,
    aliases: Mapping[str, tuple[str, ...]],
    constants: Mapping[str, Tensor],
    checkpoint: Mapping[str, Expression] | None,
) -> WeightStore:
    """Find an expression for every weight that ``graph`` reads.

    What the model's code computed (``constants``) is taken from there, as loaders do; everything else
    from the checkpoint, under its own name or another of the same tensor's (``aliases``).

    A checkpoint may mix dtypes. Each floating weight is cast on its own to the dtype that the graph was
    captured in (a narrower one rounds once, to nearest; what overflows there is refused when it is
    written), an integer only to a wider one. No other kind becomes a floating weight: integers in its
    place are codes of a quantized checkpoint, and so are 8-bit floats that come with a scale.

    Raises:
        WeightError: names are missing, or shapes or dtypes do not fit; the first few are listed.
    """
    found: dict[str, Expression] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for node in graph.fx.nodes:
        if node.op != "get_attr" or (name := str(node.target)) in found:
            continue
        shape, dtype = shape_of(node), value_of(node).dtype
        expression = _lookup(name, aliases, constants, checkpoint)
        if expression is None and checkpoint is None:
            expression = Absent(name, shape, dtype)
        if expression is None:
            missing.append(name)
        elif tuple(expression.shape) != shape:
            misshapen.append(f"{name}: the model has {list(shape)}, the checkpoint {list(expression.shape)}")
        elif not _castable(expression.dtype, dtype):
            names = dtype_name(dtype), dtype_name(expression.dtype)
            misshapen.append(f"{name}: the model has {names[0]}, the checkpoint {names[1]}")
        elif scale := _scale_of(name, expression.dtype, checkpoint or {}):
            stored = dtype_name(expression.dtype)
            misshapen.append(f"{name}: {stored} that {scale} scales, which needs the library that quantized it")
        else:
            found[name] = expression if expression.dtype == dtype else Cast(expression, dtype)
    _refuse(missing, misshapen, checkpoint or {})
    return WeightStore(found)


def _castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    if stored == wanted:
        return True
    if stored.is_floating_point or wanted.is_floating_point:
        return stored.is_floating_point and wanted.is_floating_point
    if stored.is_complex or wanted.is_complex or wanted == torch.bool:
        return False
    if stored == torch.bool:
        return True
    narrow, wide = torch.iinfo(stored), torch.iinfo(wanted)
    return wide.min <= narrow.min and narrow.max <= wide.max


def _scale_of(name: str, stored: torch.dtype, checkpoint: Mapping[str, Expression]) -> str | None:
    """The tensor that scales an 8-bit floating weight, as the usual quantizers name it beside the weight."""
    if not (stored.is_floating_point and stored.itemsize == 1):
        return None
    module = name.rpartition(".")[0]
    names = (f"{name}_scale", f"{name}_scale_inv", f"{module}.scale_weight" if module else "scale_weight")
    return next((scale for scale in names if scale in checkpoint), None)


def _lookup(
    name: str,
    aliases: Mapping[str, tuple[str, ...]],
    constants: Mapping[str, Tensor],
    checkpoint: Mapping[str, Expression] | None,
) -> Expression | None:
    if name in constants:
        return Constant(constants[name], computed=True)
    for candidate in (name, *aliases.get(name, ())):
        if checkpoint is not None and candidate in checkpoint:
            return checkpoint[candidate]
    return None


def _refuse(missing: list[str], misshapen: list[str], checkpoint: Mapping[str, Expression]) -> None:
    if misshapen:
        raise WeightError(f"{len(misshapen)} weights do not fit the model: {_listed(misshapen)}")
    if missing:
        hint = nearest(missing[0], checkpoint) if checkpoint else "; the file holds no tensors"
        raise WeightError(f"{len(missing)} weights are missing from the checkpoint: {_listed(missing)}{hint}")


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:SHOWN])
    return f"{shown}, and {len(items) - SHOWN} more" if len(items) > SHOWN else shown
