"""Axis rules of what sums products: linear layers, convolutions, matrix products, attention."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.axes.rules import Dims, Role, Walk, axis_rule, dimensions
from optpass.analysis.axes.structure import UNIT, Structure, is_unit, product
from optpass.analysis.operators import CONVOLUTIONS, FUSED_ATTENTION, TRANSPOSED_CONVOLUTIONS, argument, aten


@axis_rule(aten.linear.default)
def linear(node: Node, walk: Walk) -> Dims:
    """[…, in] · [out, in] → […, out]."""
    source, weight = walk.operand(node, "input"), walk.operand(node, "weight")
    walk.unify(source[-1], weight[-1])
    walk.role(argument(node, "weight"), len(weight) - 1, "in")
    if len(weight) == 1:
        return source[:-1]
    walk.role(argument(node, "weight"), 0, "out")
    return (*source[:-1], _with_bias(node, walk, weight[0]))


@axis_rule(*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
def convolution(node: Node, walk: Walk) -> Dims:
    """A weight is [out, in / groups, *kernel]; a transposed one's [in, out / groups, *kernel]."""
    source, weight, groups = walk.operand(node, "input"), walk.operand(node, "weight"), argument(node, "groups")
    channel = len(source) - len(weight) + 1
    whole, each = weight[:2]
    if groups != 1:
        group = walk.new(groups)
        whole = walk.unify(whole, product([group, walk.new(whole.size // groups)]))
        each = product([group, each])
    transposed = node.target in TRANSPOSED_CONVOLUTIONS
    taken, given = (whole, each) if transposed else (each, whole)
    walk.unify(source[channel], taken)
    walk.role(argument(node, "weight"), 0, "in" if transposed else "out")
    walk.role(argument(node, "weight"), 1, "out" if transposed else "in")
    return (*source[:channel], _with_bias(node, walk, given), *_spatial(node, walk, source[channel + 1 :], weight[2:]))


def _with_bias(node: Node, walk: Walk, out: Structure) -> Structure:
    bias = walk.operand(node, "bias")
    return walk.unify(out, bias[0]) if bias else out


def _spatial(node: Node, walk: Walk, dims: Dims, kernel: Dims) -> Dims:
    rank, shape, result = len(dims), walk.shape(node), []
    strides = _per_dimension(argument(node, "stride"), rank)
    transposed = node.target in TRANSPOSED_CONVOLUTIONS
    for index, (structure, size) in enumerate(zip(dims, kernel, strict=True)):
        walk.fix(size, "is a convolution's kernel")
        after = shape[len(shape) - rank + index]
        if is_unit(size) and strides[index] == 1 and after == structure.size:
            result.append(structure)
            continue
        same = strides[index] == 1 and not transposed
        result.append(walk.resampled(structure, after, "neighbours along it are convolved", same=same))
    return tuple(result)


def _per_dimension(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * rank if len(values) == 1 else values


@axis_rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(node: Node, walk: Walk) -> Dims:
    """[…, rows, k] · […, k, columns] → […, rows, columns]; a vector has no rows, or no columns."""
    return _product(walk, walk.of(node.args[0]), walk.of(node.args[1]))


@axis_rule(aten.addmm.default, aten.baddbmm.default)
def added_matmul(node: Node, walk: Walk) -> Dims:
    """The product and what is added to it."""
    found = _product(walk, walk.of(node.args[1]), walk.of(node.args[2]))
    added = walk.of(node.args[0])
    return (*found[: len(found) - len(added)], *map(walk.unify, found[len(found) - len(added) :], added))


def _product(walk: Walk, left: Dims, right: Dims) -> Dims:
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    walk.unify(left[-1], right[-2] if len(right) > 1 else right[0])
    return (*_batched(walk, left[:-2], right[:-2]), *rows, *columns)


def _batched(walk: Walk, left: Dims, right: Dims) -> Dims:
    rank = max(len(left), len(right))
    wide = [(UNIT,) * (rank - len(dims)) + tuple(dims) for dims in (left, right)]
    return tuple(map(walk.unify, *wide))


@axis_rule(*FUSED_ATTENTION)
def attention(node: Node, walk: Walk) -> Dims:
    """q […, heads, queries, e], k […, heads, keys, e], v […, heads, keys, f] → […, heads, queries, f]."""
    query, key, value = (walk.operand(node, name) for name in ("query", "key", "value"))
    mask = walk.of(node.args[3]) if len(node.args) > 3 else walk.of(node.kwargs.get("attn_mask"))
    walk.unify(query[-1], key[-1])
    walk.unify(key[-2], value[-2])
    walk.fix(key[-2], "softmax runs over it")
    if argument(node, "is_causal"):
        walk.fix(query[-2], "is counted along")
    batch = query[:-2]
    for other in (key[:-2], value[:-2]):
        batch = _shared_heads(walk, batch, other)
    if mask:
        stretched = (*batch, query[-2], key[-2])[-len(mask) :]
        walk.unified(stretched, mask)
    walk.head_dims += [query[-1], value[-1]]
    walk.heads += batch[-1:]
    walk.scales.append((node, query[-1]))
    return (*batch, query[-2], value[-1])


def _shared_heads(walk: Walk, queries: Dims, keys: Dims) -> Dims:
    """Batch dimensions of both; heads of keys that several heads of queries share (``enable_gqa``) are repeated."""
    if len(queries) != len(keys) or not queries or is_unit(keys[-1]) or queries[-1].size == keys[-1].size:
        return _batched(walk, queries, keys)
    repeats = walk.new(queries[-1].size // keys[-1].size)
    heads = walk.unify(queries[-1], product([keys[-1], repeats]))
    return (*_batched(walk, queries[:-1], keys[:-1]), heads)


@axis_rule(aten.einsum.default)
def einsum(node: Node, walk: Walk) -> Dims:
    """Dimensions of one letter are one dimension."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, output = equation.partition("->")
    letters: dict[str, Structure] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):  # type: ignore[arg-type]
        dims = walk.of(operand)
        for letter, structure in zip(_letters(term, len(dims)), dims, strict=True):
            letters[letter] = walk.unify(letters[letter], structure) if letter in letters else structure
    rank = len(walk.shape(node))
    if arrow:
        return tuple(letters[letter] for letter in _letters(output, rank))
    flat = inputs.replace("...", "").replace(",", "")
    once = sorted(letter for letter in set(flat) if flat.count(letter) == 1)
    hidden = "..." if "..." in inputs else ""
    return tuple(letters[letter] for letter in _letters(f"{hidden}{''.join(once)}", rank))


def _letters(term: str, rank: int) -> list[str]:
    """One name for each dimension; those under ``...`` are numbered from the right."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]


@axis_rule(aten.bilinear.default)
def bilinear(node: Node, walk: Walk) -> Dims:
    """[…, i], [out, i, j], […, j] → […, out]."""
    one, two, weight = walk.of(node.args[0]), walk.of(node.args[1]), walk.of(node.args[2])
    outer = walk.unified(one[:-1], two[:-1])
    walk.unify(one[-1], weight[1])
    walk.unify(two[-1], weight[2])
    roles: tuple[Role, ...] = ("out", "in", "in")
    for dim, role in enumerate(roles):
        walk.role(node.args[2], dim, role)
    return (*outer, _with_bias(node, walk, weight[0]))


@axis_rule(aten.tensordot.default)
def tensordot(node: Node, walk: Walk) -> Dims:
    """The dimensions that are not summed over: those of the one, those of the other."""
    one, two = walk.of(node.args[0]), walk.of(node.args[1])
    summed = [dimensions(argument(node, f"dims_{side}"), len(dims)) for side, dims in (("self", one), ("other", two))]
    for left, right in zip(*summed, strict=True):
        walk.unify(one[left], two[right])
    rest = [s for dim, s in enumerate(one) if dim not in summed[0]]
    return (*rest, *(s for dim, s in enumerate(two) if dim not in summed[1]))


@axis_rule(aten.inner.default)
def inner(node: Node, walk: Walk) -> Dims:
    """[…, k] and […, k] → […, …]."""
    one, two = walk.of(node.args[0]), walk.of(node.args[1])
    walk.unify(one[-1], two[-1])
    return (*one[:-1], *two[:-1])
