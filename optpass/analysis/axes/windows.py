"""Axis rules of what moves elements between channels and pixels: patches, windows, shuffles."""

from __future__ import annotations

from torch.fx import Node

from optpass.analysis.axes.rules import Dims, Walk, axis_rule
from optpass.analysis.axes.structure import product, quotient
from optpass.analysis.operators import argument, aten


@axis_rule(aten.pixel_shuffle.default)
def pixel_shuffle(node: Node, walk: Walk) -> Dims:
    """[…, c·r², h, w] → […, c, h·r, w·r]."""
    *outer, channels, height, width = walk.of(node.args[0])
    factor = int(argument(node, "upscale_factor"))
    kept, taken = walk.algebra.split(channels, channels.size // factor**2, factor**2)
    walk.fix(taken, "becomes pixels")
    shape = walk.shape(node)
    reason = "pixels are put between its elements"
    return (
        *outer,
        kept,
        walk.resampled(height, shape[-2], reason),
        walk.resampled(width, shape[-1], reason),
    )


@axis_rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(node: Node, walk: Walk) -> Dims:
    """[…, c, h·r, w·r] → […, c·r², h, w]."""
    *outer, channels, height, width = walk.of(node.args[0])
    factor = int(argument(node, "downscale_factor"))
    shape, reason = walk.shape(node), "its elements become channels"
    taken = walk.algebra.fixed_new(factor**2, reason)
    return (
        *outer,
        product([channels, taken]),
        walk.resampled(height, shape[-2], reason),
        walk.resampled(width, shape[-1], reason),
    )


@axis_rule(aten.channel_shuffle.default)
def channel_shuffle(node: Node, walk: Walk) -> Dims:
    """[b, groups · c, …] → [b, c · groups, …]."""
    dims, groups = walk.of(node.args[0]), int(argument(node, "groups"))
    group, each = walk.algebra.split(dims[1], groups, dims[1].size // groups)
    walk.fix(group, "is shuffled by as many groups")
    return walk.replaced(dims, {1: product([each, group])})


@axis_rule(aten.im2col.default)
def im2col(node: Node, walk: Walk) -> Dims:
    """[…, c, h, w] → […, c · kernel, windows]."""
    *outer, channels, height, width = walk.of(node.args[0])
    kernel, reason = argument(node, "kernel_size"), "is cut into windows"
    window = walk.algebra.fixed_new(kernel[0] * kernel[1], "is the inside of a window")
    places = walk.resampled(product([height, width]), walk.shape(node)[-1], reason)
    return (*outer, product([channels, window]), places)


@axis_rule(aten.col2im.default)
def col2im(node: Node, walk: Walk) -> Dims:
    """[…, c · kernel, windows] → […, c, h, w]."""
    *outer, columns, places = walk.of(node.args[0])
    kernel = argument(node, "kernel_size")
    area = kernel[0] * kernel[1]
    channels, window = walk.algebra.split(columns, quotient(columns.size, area), area)
    walk.fix(window, "is the inside of a window")
    rest = [walk.resampled(places, size, "windows are added up along it") for size in walk.shape(node)[-2:]]
    return (*outer, channels, *rest)


@axis_rule(aten.unfold.default)
def unfold(node: Node, walk: Walk) -> Dims:
    """[…, n, …] → […, windows, …, size]."""
    dims, rank = walk.of(node.args[0]), len(walk.of(node.args[0]))
    dim = int(argument(node, "dimension")) % rank
    windows = walk.resampled(dims[dim], walk.shape(node)[dim], "is cut into windows")
    return (*walk.replaced(dims, {dim: windows}), walk.algebra.fixed_new(walk.shape(node)[-1], "is a window"))


@axis_rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(node: Node, walk: Walk) -> Dims:
    """[b, c, …] at the places [b, …, coordinates] → [b, c, …]."""
    dims, grid = walk.of(node.args[0]), walk.of(node.args[1])
    for structure in (*dims[2:], grid[-1]):
        walk.fix(structure, "is interpolated at given places")
    return (walk.unify(dims[0], grid[0]), dims[1], *grid[1:-1])
