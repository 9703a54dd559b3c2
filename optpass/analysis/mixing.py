"""Which axes a residual branch mixes: frames, or positions of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch.fx import Node

from optpass.analysis.layouts import Layout, mixes_outer_axis
from optpass.analysis.operators import CONVOLUTIONS, argument
from optpass.analysis.residuals import Residual
from optpass.ir.graph import shape_of

Mixing = Literal["temporal", "spatial"]
KERNEL = 2
"""Dimensions of a convolution's weight in front of those of its kernel."""


def mixed_axes(residual: Residual, layouts: Mapping[Node, Layout]) -> frozenset[Mixing]:
    """What the branch mixes, everything inside of it included; nothing where it works on every position alone.

    ``layouts`` are those of the residual's graph. Attention to something else than the stream (a text) mixes nothing
    of it. A kernel is temporal that spans the first of three axes and no other, which frames are in PyTorch's
    convention, or the frames of a value whose pixels are folded into the batch.
    """
    found: set[Mixing] = set()
    if residual.kind in ("self-attention", "temporal-attention"):
        found.add("temporal" if residual.kind == "temporal-attention" else "spatial")
    for node in residual.nodes:
        if node.target in CONVOLUTIONS and (mixing := _of_kernel(node, layouts)):
            found.add(mixing)
    return frozenset(found).union(*(mixed_axes(inner, layouts) for inner in residual.inner))


def _of_kernel(node: Node, layouts: Mapping[Node, Layout]) -> Mixing | None:
    weight: Any = argument(node, "weight")
    kernel = shape_of(weight)[KERNEL:]
    spanned = [axis for axis, size in enumerate(kernel) if size != 1]
    if not spanned:
        return None
    if len(kernel) == 3:
        return "temporal" if spanned == [0] else "spatial"
    operand: Any = argument(node, "input")
    layout = layouts.get(operand)
    outer = layout is not None and len(spanned) == 1 and mixes_outer_axis(layout, KERNEL + spanned[0])
    return "temporal" if outer else "spatial"
