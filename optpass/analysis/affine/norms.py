"""Normalisations by the statistics of their input: no affine maps, but they end in one."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.affine.constants import Constants
from optpass.analysis.affine.maps import Affine, channelwise
from optpass.analysis.operators import argument, aten
from optpass.ir.algebra import Full
from optpass.ir.graph import shape_of
from optpass.ir.weights import Expression

NORMS: dict[Any, tuple[str, ...]] = {
    aten.layer_norm.default: ("weight", "bias"),
    aten.group_norm.default: ("weight", "bias"),
    aten.rms_norm.default: ("weight",),
}
"""Operators, and the names of the arguments that scale and shift after the normalisation."""


def norm_affine(node: Node, constants: Constants) -> Affine | None:
    """Scale and shift per channel that end ``node``; None where it is no such normalisation, or has neither."""
    names = NORMS.get(node.target) if node.op == "call_function" else None
    if names is None:
        return None
    given = {name: argument(node, name) for name in names}
    found = {name: constants(value) for name, value in given.items()}
    present = [value for value in found.values() if value is not None]
    unknown = any(found[name] is None and given[name] is not None for name in names)
    if unknown or not present or len(present[0].shape) != 1:
        return None
    spatial = len(shape_of(node)) - 2 if node.target is aten.group_norm.default else 0
    scale: Expression = found["weight"] or Full(present[0].shape, 1.0, present[0].dtype)
    return channelwise(scale, found.get("bias"), spatial)
