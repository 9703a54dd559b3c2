"""The sum of two affine maps of one value, as one map, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from optpass.analysis.affine.composition import regrouped
from optpass.analysis.affine.expressions import added, scalar_sum
from optpass.analysis.affine.maps import Affine, Map, NotExactError, Transposed, Uniform, by
from optpass.ir.algebra import Full, Pad
from optpass.ir.weights import Expression, Shape, Sum


def add(left: Map, right: Map) -> Map:
    """x ↦ left(x) + right(x), which have results of one shape.

    Raises:
        NotExactError: strides, dilations or the centres of the kernels differ.
    """
    if isinstance(left, Uniform) and isinstance(right, Uniform):
        scale = scalar_sum(left.scale, right.scale) or Full((), 0.0, left.scale.dtype)
        return Uniform(scale, scalar_sum(left.shift, right.shift))
    if isinstance(left, Transposed) or isinstance(right, Transposed):
        return _transposed(left, right)
    if isinstance(left, Uniform):
        assert isinstance(right, Affine)
        left = left.along(right.inputs, right.spatial)
    if isinstance(right, Uniform):
        right = right.along(left.inputs, left.spatial)
    if left.stride != right.stride:
        raise NotExactError(f"the branches have strides {by(left.stride)} and {by(right.stride)}")
    groups = gcd(left.groups, right.groups)
    dilation, padding = _common_grid(left, right)
    first, second = (_aligned(regrouped(item, groups), item, dilation, padding) for item in (left, right))
    return Affine(Sum(first, second), added(left.bias, right.bias), groups, left.stride, padding, dilation)


def _common_grid(left: Affine, right: Affine) -> tuple[Shape, Shape]:
    """Dilation and padding of the smallest kernel that holds both kernels."""
    dilations, paddings = [], []
    for axis in range(left.spatial):
        sizes = [form.kernel[axis] for form in (left, right)]
        pads = [form.padding[axis] for form in (left, right)]
        steps = {form.dilation[axis] for form in (left, right) if form.kernel[axis] > 1} or {1}
        if len(steps) > 1:
            raise NotExactError(f"the branches have dilations {by(left.dilation)} and {by(right.dilation)}")
        [step] = steps
        # Twice the distance from the middle of the kernel to the position that it computes.
        centres = {2 * pad - step * (size - 1) for pad, size in zip(pads, sizes, strict=True)}
        if len(centres) > 1 or (pads[0] - pads[1]) % step:
            raise NotExactError(
                f"the branches' kernels {by(left.kernel)} and {by(right.kernel)}, padded by {by(left.padding)}"
                f" and {by(right.padding)}, are centred differently"
            )
        dilations.append(step)
        paddings.append(max(pads))
    return tuple(dilations), tuple(paddings)


def _aligned(weight: Expression, form: Affine, dilation: Shape, padding: Shape) -> Expression:
    """``weight`` with zeros around its kernel, so that it starts where one padded by ``padding`` does."""
    around = [(wide - own) // d for wide, own, d in zip(padding, form.padding, dilation, strict=True)]
    if not any(around):
        return weight
    return Pad(weight, (0, 0, *around), (0, 0, *around))


def _transposed(left: Map, right: Map) -> Map:
    """Two transposed convolutions of one geometry."""
    pair = left, right
    if not isinstance(left, Transposed) or not isinstance(right, Transposed) or len(set(map(_geometry, pair))) > 1:
        raise NotExactError("a transposed convolution adds up with one of the same geometry alone")
    return replace(left, weight=Sum(left.weight, right.weight), bias=added(left.bias, right.bias))


def _geometry(item: Map) -> object:
    assert isinstance(item, Transposed)
    return item.weight.shape, item.groups, item.stride, item.padding, item.output_padding, item.dilation
