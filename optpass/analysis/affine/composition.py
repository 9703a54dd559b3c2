"""One affine map after another, as one map: exact at the borders too, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from optpass.analysis.affine.expressions import added, is_ones, reshaped, scalar_product, scalar_sum, spread, times
from optpass.analysis.affine.maps import Affine, Map, NotExactError, Transposed, Uniform, by
from optpass.ir.algebra import Einsum, Eye
from optpass.ir.weights import Expression, Shape

OUTER_AXES, INNER_AXES = "xyz", "uvw"
"""Letters of kernel axes in equations: the outer map's, the inner one's."""


def compose(outer: Map, inner: Map) -> Map:
    """x ↦ outer(inner(x)).

    Raises:
        NotExactError: one operator cannot compute it, the borders included.
    """
    if isinstance(outer, Uniform):
        return _after(outer, inner)
    if isinstance(inner, Uniform):
        if inner.shift is None:
            return replace(outer, weight=times(outer.weight, inner.scale))
        inner = inner.along(outer.inputs, outer.spatial)
    if isinstance(outer, Transposed) or isinstance(inner, Transposed):
        return _transposed(outer, inner)
    _check_borders(outer, inner)
    weight, groups = _composed_weight(outer, inner)
    return Affine(
        weight,
        added(None if inner.bias is None else _through(outer, inner.bias), outer.bias),
        groups,
        tuple(o * i for o, i in zip(outer.stride, inner.stride, strict=True)),
        tuple(i + s * o for o, i, s in zip(outer.padding, inner.padding, inner.stride, strict=True)),
        _composed_dilation(outer, inner),
    )


def _after(outer: Uniform, inner: Map) -> Map:
    if isinstance(inner, Uniform):
        shift = None if inner.shift is None else scalar_product(outer.scale, inner.shift)
        return Uniform(scalar_product(outer.scale, inner.scale), scalar_sum(shift, outer.shift))
    shift = None if outer.shift is None else spread(outer.shift, (inner.outputs,))
    bias = None if inner.bias is None else times(inner.bias, outer.scale)
    return replace(inner, weight=times(inner.weight, outer.scale), bias=added(bias, shift))


def _transposed(outer: Affine | Transposed, inner: Affine | Transposed) -> Map:
    """A scale per channel on either side of a transposed convolution, and a shift behind it."""
    if isinstance(outer, Affine) and isinstance(inner, Transposed) and outer.is_elementwise:
        groups, per_group = inner.groups, inner.outputs // inner.groups
        scale = reshaped(outer.weight, (groups, per_group))
        weight = reshaped(inner.weight, (groups, inner.inputs // groups, *inner.weight.shape[1:]))
        axes = OUTER_AXES[: inner.spatial]
        scaled = reshaped(Einsum(f"gio{axes},go->gio{axes}", (weight, scale)), inner.weight.shape)
        shift = added(None if inner.bias is None else _through(outer, inner.bias), outer.bias)
        return replace(inner, weight=scaled, bias=shift)
    if isinstance(inner, Affine) and isinstance(outer, Transposed) and inner.is_elementwise and inner.bias is None:
        axes = OUTER_AXES[: outer.spatial]
        scale = reshaped(inner.weight, (inner.outputs,))
        return replace(outer, weight=Einsum(f"io{axes},i->io{axes}", (outer.weight, scale)))
    raise NotExactError("with a transposed convolution only a scale per channel, and a shift behind it, becomes one")


def _composed_dilation(outer: Affine, inner: Affine) -> Shape:
    """The inner kernel's, or the outer one's in steps of the inner stride; 1 where neither is wide."""
    axes = zip(outer.kernel, inner.kernel, outer.dilation, inner.dilation, inner.stride, strict=True)
    return tuple(di if ki > 1 else do * stride if ko > 1 else 1 for ko, ki, do, di, stride in axes)


def _check_borders(outer: Affine, inner: Affine) -> None:
    """Where ``outer`` pads, it reads zeros and not what ``inner`` makes of the padding around its own input."""
    for size, padding, inside in zip(outer.kernel, outer.padding, inner.kernel, strict=True):
        if size > 1 and inside > 1:
            raise NotExactError(f"a {by(outer.kernel)} kernel over a {by(inner.kernel)} kernel is a larger kernel")
        if padding and inside > 1:
            raise NotExactError(f"padding stands between this and a {by(inner.kernel)} kernel")
    if any(outer.padding) and inner.bias is not None:
        raise NotExactError(
            f"the {by(outer.kernel)} kernel pads with zeros, where the constant that would be folded into it is added:"
            " the border would differ"
        )


def _composed_weight(outer: Affine, inner: Affine) -> tuple[Expression, int]:
    """The kernel of the composition and its groups; along each axis one of the two kernels has size 1."""
    a, b = _axes(outer.kernel, OUTER_AXES), _axes(inner.kernel, INNER_AXES)
    shared = "".join(x + y for x, y in zip(a, b, strict=True))
    kernel = tuple(map(max, outer.kernel, inner.kernel))
    left, right = "".join(a), "".join(b)
    if inner.is_elementwise and is_ones(inner.weight):
        return outer.weight, outer.groups
    if outer.is_channelwise:
        if outer.is_elementwise and is_ones(outer.weight):
            return inner.weight, inner.groups
        scale = reshaped(outer.weight, (outer.outputs, *_sizes(outer.kernel)))
        weight = squeezed(inner.weight, inner.kernel)
        made = Einsum(f"o{left},oi{right}->oi{shared}", (scale, weight))
        return reshaped(made, (*inner.weight.shape[:2], *kernel)), inner.groups
    groups = outer.groups if inner.is_channelwise else gcd(outer.groups, inner.groups)
    letter = "g" if groups > 1 else ""
    first = _split(regrouped(outer, groups), outer.kernel, groups)
    if inner.is_channelwise:
        each = reshaped(inner.weight, (*_group(groups), inner.outputs // groups, *_sizes(inner.kernel)))
        made = Einsum(f"{letter}oi{left},{letter}i{right}->{letter}oi{shared}", (first, each))
    else:
        second = _split(regrouped(inner, groups), inner.kernel, groups)
        made = Einsum(f"{letter}om{left},{letter}mi{right}->{letter}oi{shared}", (first, second))
    return reshaped(made, (outer.outputs, inner.inputs // groups, *kernel)), groups


def _through(form: Affine, bias: Expression) -> Expression:
    """What ``form``, which pads nothing, makes of a constant per input channel."""
    axes = "".join(_axes(form.kernel, OUTER_AXES))
    if form.is_channelwise:
        if is_ones(form.weight) and form.is_pointwise:
            return bias
        scale = reshaped(form.weight, (form.outputs, *_sizes(form.kernel)))
        return Einsum(f"o{axes},o->o", (scale, bias))
    groups, letter = form.groups, "g" if form.groups > 1 else ""
    each = reshaped(bias, (*_group(groups), form.inputs // groups))
    weight = _split(form.weight, form.kernel, groups)
    return reshaped(Einsum(f"{letter}oi{axes},{letter}i->{letter}o", (weight, each)), (form.outputs,))


def regrouped(form: Affine, groups: int) -> Expression:
    """The kernel of ``form`` in fewer ``groups``, which divide its own: blocks along the diagonal, zeros elsewhere."""
    if groups == form.groups:
        return form.weight
    blocks, letter = form.groups // groups, "g" if groups > 1 else ""
    out, fan_in = form.outputs // form.groups, form.weight.shape[1]
    axes = "".join(_axes(form.kernel, OUTER_AXES))
    parts = reshaped(form.weight, (*_group(groups), blocks, out, fan_in, *_sizes(form.kernel)))
    made = Einsum(f"{letter}boi{axes},bc->{letter}boci{axes}", (parts, Eye(blocks, form.weight.dtype)))
    return reshaped(made, (form.outputs, form.inputs // groups, *form.kernel))


def _axes(kernel: Shape, letters: str) -> list[str]:
    return [letter if size > 1 else "" for letter, size in zip(letters, kernel, strict=False)]


def _sizes(kernel: Shape) -> Shape:
    return tuple(size for size in kernel if size > 1)


def _group(groups: int) -> Shape:
    return (groups,) if groups > 1 else ()


def squeezed(weight: Expression, kernel: Shape) -> Expression:
    """[out, in / groups, *kernel] without the kernel axes of size 1."""
    return reshaped(weight, (*weight.shape[:2], *_sizes(kernel)))


def _split(weight: Expression, kernel: Shape, groups: int) -> Expression:
    """[groups, out / groups, in / groups, *kernel], axes of size 1 and a single group left out."""
    out, fan_in = weight.shape[:2]
    return reshaped(weight, (*_group(groups), out // groups, fan_in, *_sizes(kernel)))
