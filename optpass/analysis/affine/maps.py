"""The algebra of affine maps over channels: composition, sum and price, exact or refused with a reason.

A linear layer is a convolution without spatial axes, so one record holds both: its channels lie along the last
dimension where it has no spatial axes, and along dimension 1 where it has some. What acts on each channel alone
(a BatchNorm in inference, a layer scale) is the grouped case with as many groups as channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd, prod
from typing import NamedTuple

from optpass.ir.algebra import Einsum, Eye, Full, Pad
from optpass.ir.weights import Expression, Reshape, Scale, Shape, Sum

OUTER_AXES, INNER_AXES = "xyz", "uvw"
"""Letters of kernel axes in equations: the outer map's, the inner one's."""


class NotExactError(Exception):
    """Two maps have no common one of this kind that computes the same at the borders; says why."""


class Price(NamedTuple):
    """What an operator costs, compared in this order: multiply-accumulates, stored weight elements, nodes."""

    macs: float
    weights: float
    nodes: float

    def plus(self, other: Price) -> Price:
        return Price(self.macs + other.macs, self.weights + other.weights, self.nodes + other.nodes)

    def less(self, other: Price) -> Price:
        return Price(self.macs - other.macs, self.weights - other.weights, self.nodes - other.nodes)

    def shared(self, users: int) -> Price:
        """One user's part."""
        return Price(self.macs / users, self.weights / users, self.nodes / users)


FREE = Price(0, 0, 0)


@dataclass(frozen=True, eq=False)
class Uniform:
    """x ↦ scale·x + shift with scalars (shape ``()``); no shift is None. The identity has scale 1 and no shift."""

    scale: Expression
    shift: Expression | None = None

    @property
    def is_identity(self) -> bool:
        return is_ones(self.scale) and self.shift is None

    def along(self, channels: int, spatial: int) -> Affine:
        """The same map over ``channels`` in front of ``spatial`` kernel axes."""
        weight = spread(self.scale, (channels, 1, *[1] * spatial))
        bias = None if self.shift is None else spread(self.shift, (channels,))
        return channelwise(weight, bias, spatial)

    def price(self, shape: Shape) -> Price:
        parts = [part for part in (None if is_ones(self.scale) else self.scale, self.shift) if part is not None]
        return Price(0, sum(not isinstance(part, Full) for part in parts), len(parts))


@dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ W∗x + b: ``weight`` is [out, in / groups, *kernel], ``bias`` [out] or None, sizes per kernel axis.

    Padding is of zeros, by ``padding`` on both sides.
    """

    weight: Expression
    bias: Expression | None
    groups: int
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @property
    def kernel(self) -> Shape:
        return self.weight.shape[2:]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def is_channelwise(self) -> bool:
        """Whether each channel depends on the same channel alone."""
        return self.groups == self.inputs == self.outputs

    @property
    def is_pointwise(self) -> bool:
        """Whether each position depends on the same position alone."""
        return prod(self.kernel) == prod(self.stride) == 1 and not any(self.padding)

    @property
    def is_elementwise(self) -> bool:
        return self.is_channelwise and self.is_pointwise

    def price(self, shape: Shape) -> Price:
        """As one operator whose result has ``shape``; scale and shift per channel have no products that count."""
        bias = 0 if self.bias is None else self.outputs
        if self.is_elementwise:
            scale = 0 if is_ones(self.weight) else self.outputs
            return Price(0, scale + bias, (scale > 0) + (bias > 0))
        # There is no grouped linear: without spatial axes it is dense.
        fan_in = prod(self.weight.shape[1:]) * (1 if self.spatial else self.groups)
        return Price(prod(shape) * fan_in, self.outputs * fan_in + bias, 1)


Map = Uniform | Affine


def channelwise(weight: Expression, bias: Expression | None, spatial: int) -> Affine:
    """Scale and shift per channel; ``weight`` has one element a channel, whatever its shape."""
    channels, ones = weight.numel, (1,) * spatial
    return Affine(reshaped(weight, (channels, 1, *ones)), bias, channels, ones, (0,) * spatial, ones)


def compose(outer: Map, inner: Map) -> Map:
    """x ↦ outer(inner(x)).

    Raises:
        NotExactError: one operator cannot compute it, the borders included.
    """
    if isinstance(outer, Uniform):
        return _after(outer, inner)
    if isinstance(inner, Uniform):
        if inner.shift is None:
            return _with(outer, times(outer.weight, inner.scale), outer.bias)
        inner = inner.along(outer.inputs, outer.spatial)
    _check_borders(outer, inner)
    weight, groups = _composed_weight(outer, inner)
    wide = [k > 1 for k in inner.kernel]
    return Affine(
        weight,
        added(None if inner.bias is None else _through(outer, inner.bias), outer.bias),
        groups,
        tuple(o * i for o, i in zip(outer.stride, inner.stride, strict=True)),
        tuple(i + s * o for o, i, s in zip(outer.padding, inner.padding, inner.stride, strict=True)),
        tuple(
            di if w else do * s for di, do, s, w in zip(inner.dilation, outer.dilation, inner.stride, wide, strict=True)
        ),
    )


def add(left: Map, right: Map) -> Map:
    """x ↦ left(x) + right(x), which have results of one shape.

    Raises:
        NotExactError: strides, dilations or the centres of the kernels differ.
    """
    if isinstance(left, Uniform) and isinstance(right, Uniform):
        return Uniform(_scalar_sum(left.scale, right.scale), _scalar_added(left.shift, right.shift))
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


def _after(outer: Uniform, inner: Map) -> Map:
    if isinstance(inner, Uniform):
        shift = None if inner.shift is None else _scalar_product(outer.scale, inner.shift)
        return Uniform(_scalar_product(outer.scale, inner.scale), _scalar_added(shift, outer.shift))
    shift = None if outer.shift is None else spread(outer.shift, (inner.outputs,))
    bias = None if inner.bias is None else times(inner.bias, outer.scale)
    return _with(inner, times(inner.weight, outer.scale), added(bias, shift))


def _with(form: Affine, weight: Expression, bias: Expression | None) -> Affine:
    return Affine(weight, bias, form.groups, form.stride, form.padding, form.dilation)


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


def by(sizes: Shape) -> str:
    """``3×3``."""
    return "×".join(map(str, sizes))


def reshaped(expression: Expression, shape: Shape) -> Expression:
    """``expression`` under ``shape``; itself where it has it, and one reshape where it is one."""
    if expression.shape == shape:
        return expression
    if isinstance(expression, Full):
        return Full(shape, expression.value, expression.dtype)
    if isinstance(expression, Reshape):
        return reshaped(expression.operand, shape)
    return Reshape(expression, shape)


def is_ones(expression: Expression) -> bool:
    """Whether it is known without reading it that every element is 1."""
    return isinstance(expression, Full) and expression.value == 1.0


def spread(scalar: Expression, shape: Shape) -> Expression:
    """A scalar everywhere in ``shape``."""
    if isinstance(scalar, Full):
        return Full(shape, scalar.value, scalar.dtype)
    letters = "".join(chr(ord("a") + axis) for axis in range(len(shape)))
    return Einsum(f"{letters},->{letters}", (Full(shape, 1.0, scalar.dtype), scalar))


def times(expression: Expression, scalar: Expression) -> Expression:
    """``expression`` times a scalar."""
    if is_ones(scalar):
        return expression
    if isinstance(scalar, Full):
        return Scale(expression, scalar.value)
    letters = "".join(chr(ord("a") + axis) for axis in range(len(expression.shape)))
    return Einsum(f"{letters},->{letters}", (expression, scalar))


def added(*parts: Expression | None) -> Expression | None:
    """The sum of those that are there."""
    present = [part for part in parts if part is not None]
    return reduce(Sum, present) if present else None


def _scalar_product(a: Expression, b: Expression) -> Expression:
    if isinstance(a, Full) and isinstance(b, Full):
        return Full((), a.value * b.value, a.dtype)
    return times(a, b)


def _scalar_sum(a: Expression, b: Expression) -> Expression:
    if isinstance(a, Full) and isinstance(b, Full):
        return Full((), a.value + b.value, a.dtype)
    return Sum(a, b)


def _scalar_added(a: Expression | None, b: Expression | None) -> Expression | None:
    if a is None or b is None:
        return b if a is None else a
    total = _scalar_sum(a, b)
    return None if isinstance(total, Full) and total.value == 0 else total
