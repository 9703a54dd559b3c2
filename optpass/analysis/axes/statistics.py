"""Axis rules of normalisations, reductions and whatever mixes neighbours: pooling, interpolation, padding."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.axes.rules import Dims, Normalised, Results, Walk, axis_rule, dimension, dimensions
from optpass.analysis.axes.structure import UNIT
from optpass.analysis.operators import SOFTMAX, argument, aten
from optpass.ir.sizes import sizes_of


@axis_rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(node: Node, walk: Walk) -> Dims:
    """Statistics over the last dimensions, which the affine parameters have."""
    dims, shape = walk.operand(node, "input"), argument(node, "normalized_shape")
    last = dims[len(dims) - len(shape) :]
    for name in ("weight", "bias") if node.target is aten.layer_norm.default else ("weight",):
        if affine := walk.operand(node, name):
            last = walk.unified(last, affine)
    walk.normalised += [Normalised(node, structure) for structure in last]
    _scales(node, walk)
    return (*dims[: len(dims) - len(last)], *last)


def _scales(node: Node, walk: Walk) -> None:
    for dim in range(len(walk.operand(node, "weight"))):
        walk.role(argument(node, "weight"), dim, "scale")


@axis_rule(aten._weight_norm.default)
def weight_norm(node: Node, walk: Walk) -> Dims:
    """Directions, each of a length of its own: statistics over all dimensions but one."""
    dims, lengths = walk.of(node.args[0]), walk.of(node.args[1])
    dim = dimension(node, "dim", len(dims))
    walk.normalised += [Normalised(node, s) for index, s in enumerate(dims) if index != dim]
    walk.role(node.args[1], dim, "scale")
    return walk.unified(dims, lengths)


@axis_rule(aten.cosine_similarity.default)
def cosine_similarity(node: Node, walk: Walk) -> Dims:
    """Both normalised along a dimension, multiplied and summed over it."""
    dims = walk.broadcast(node.args[0], node.args[1])
    dim = dimension(node, "dim", len(dims))
    walk.normalised.append(Normalised(node, dims[dim]))
    return dims[:dim] + dims[dim + 1 :]


@axis_rule(aten.group_norm.default)
def group_norm(node: Node, walk: Walk) -> Dims:
    """Statistics over each of equally many channels; a group may cross the seam of a concatenation."""
    dims = walk.operand(node, "input")
    channels = dims[1]
    for name in ("weight", "bias"):
        if affine := walk.operand(node, name):
            channels = walk.unify(channels, affine[0])
    walk.normalised.append(Normalised(node, channels, int(argument(node, "num_groups"))))
    _scales(node, walk)
    for structure in dims[2:]:
        walk.fix(structure, "a group norm's statistics run over it")
    return walk.replaced(dims, {1: channels})


@axis_rule(aten.prelu.default)
def prelu(node: Node, walk: Walk) -> Dims:
    """A slope for every channel, or one for all."""
    dims, slopes = walk.of(node.args[0]), walk.of(node.args[1])
    return walk.replaced(dims, {1: walk.unify(dims[1], slopes[0])}) if len(dims) > 1 and slopes else dims


@axis_rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.instance_norm.default)
def batch_norm(node: Node, walk: Walk) -> Results:
    """Every channel by itself."""
    dims = walk.operand(node, "input")
    channels = dims[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if affine := walk.operand(node, name):
            channels = walk.unify(channels, affine[0])
    _scales(node, walk)
    result = walk.replaced(dims, {1: channels})
    return result if not isinstance(node.meta["val"], (tuple, list)) else [result, (UNIT,), (UNIT,)]


@axis_rule(
    *(*SOFTMAX, aten.log_softmax.int, aten.cumsum.default, aten.cumprod.default),
    *(aten.sort.default, aten.sort.stable, aten.argsort.default),
)
def along(node: Node, walk: Walk) -> Results:
    """Every element depends on the others along a dimension."""
    dims = walk.of(node.args[0])
    walk.fix(dims[dimension(node, "dim", len(dims))], f"{node.target} runs over it")
    return _for_each(node, dims)


@axis_rule(aten.topk.default, aten.diff.default)
def shortened(node: Node, walk: Walk) -> Results:
    """The same, and fewer elements of it come out."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], f"{node.target} runs over it")
    value: Any = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    new = walk.algebra.fixed_new(sizes_of(first)[dim], f"{node.target} makes it")
    return _for_each(node, walk.replaced(dims, {dim: new}))


def _for_each(node: Node, dims: Dims) -> Results:
    """``dims`` of a single result, or of each of several."""
    value: Any = node.meta["val"]
    return [dims] * len(value) if isinstance(value, (tuple, list)) else dims


@axis_rule(
    aten.mean.dim,
    aten.var.dim,
    aten.var.correction,
    aten.std.dim,
    aten.std.correction,
    aten.var_mean.dim,
    aten.var_mean.correction,
    aten.std_mean.dim,
    aten.std_mean.correction,
    aten.linalg_vector_norm.default,
)
def statistic(node: Node, walk: Walk) -> Results:
    """A statistic over some dimensions."""
    dims = walk.of(node.args[0])
    return _reduced(node, walk, dims, lambda structure: walk.normalised.append(Normalised(node, structure)))


@axis_rule(
    *(aten.sum.dim_IntList, aten.prod.dim_int, aten.logsumexp.default),
    *(aten.amax.default, aten.amin.default, aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim),
    *(aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims),
)
def reduction(node: Node, walk: Walk) -> Results:
    """Without some dimensions, or with 1 element of them."""
    dims = walk.of(node.args[0])
    return _reduced(node, walk, dims, lambda structure: walk.fix(structure, f"{node.target} reduces it"))


@axis_rule(
    *(aten.sum.default, aten.mean.default, aten.prod.default, aten.max.default, aten.min.default),
    *(aten.any.default, aten.all.default, aten.var.default, aten.std.default),
)
def whole(node: Node, walk: Walk) -> Dims:
    """One number."""
    walk.fix_all(walk.of(node.args[0]), f"{node.target} reduces it")
    return ()


def _reduced(node: Node, walk: Walk, dims: Dims, note: Any) -> Results:
    asked = dimensions(argument(node, "dim"), len(dims))
    for dim in asked:
        note(dims[dim])
    keep = bool(argument(node, "keepdim"))
    return _for_each(
        node,
        tuple(
            UNIT if index in asked else structure for index, structure in enumerate(dims) if keep or index not in asked
        ),
    )


@axis_rule(
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default),
    *(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten._upsample_nearest_exact2d.default, aten._upsample_nearest_exact2d.vec),
    *(aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec),
    *(aten.upsample_bicubic2d.default, aten.upsample_bicubic2d.vec, aten.upsample_trilinear3d.vec),
    *(aten._upsample_bilinear2d_aa.default, aten._upsample_bilinear2d_aa.vec),
    *(aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa.vec),
)
def resample(node: Node, walk: Walk) -> Results:
    """Batch and channels stay; the rest is pooled or interpolated."""
    dims = walk.of(node.args[0])
    value: Any = node.meta["val"]
    shape = sizes_of(value[0] if isinstance(value, (tuple, list)) else value)
    spatial = _spatial_rank(node)
    kept = len(dims) - spatial
    rest = [
        walk.resampled(s, n, "neighbours along it are pooled or interpolated")
        for s, n in zip(dims[kept:], shape[kept:], strict=True)
    ]
    return _for_each(node, (*dims[:kept], *rest))


def _spatial_rank(node: Node) -> int:
    name = str(node.target)
    return next(rank for rank in (1, 2, 3) if f"{rank}d" in name)


@axis_rule(
    *(aten.constant_pad_nd.default, aten.pad.default),
    *(aten.reflection_pad1d.default, aten.reflection_pad2d.default),
    *(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default),
)
def pad(node: Node, walk: Walk) -> Dims:
    """Longer (or shorter) along the last dimensions."""
    dims, shape = walk.of(node.args[0]), walk.shape(node)
    amounts: Any = node.args[1]
    padded = {len(dims) - 1 - index // 2 for index, amount in enumerate(amounts) if amount != 0}
    return tuple(
        walk.resampled(structure, shape[index], "is padded") if index in padded else structure
        for index, structure in enumerate(dims)
    )
