"""How much each element of a group matters, by what stands in its weights: one weight in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from optpass.analysis.axes import Axes, Group
from optpass.analysis.axes.structure import Atom, Concatenation, Structure, resolved
from optpass.ir.algebra import BLOCK
from optpass.ir.program import Program

Criterion = Literal["l1", "l2", "norm-scale", "taylor", "random"]
Values = Mapping[str, Tensor]


def channel_scores(
    program: Program,
    found: Axes,
    groups: Sequence[Group],
    criterion: Criterion,
    *,
    importance: Values | None = None,
    seed: int = 0,
) -> dict[Atom, Tensor]:
    """A score for every element of every group, [size] in float64; the lower, the sooner it goes.

    ``l1`` and ``l2``: the norm of everything in the weights of products that an element is a part of, whether they
    give it or sum over it (Li et al., arXiv 1608.08710; over groups: Fang et al., arXiv 2301.12900). ``norm-scale``:
    |γ| of the norms on it (Liu et al., arXiv 1708.06519). ``taylor``: the sum of ``importance``, which has a value
    for every element of every weight (Molchanov et al., arXiv 1906.10771). A group without such weights has no score.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {group.atom: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}
    roles = ("scale",) if criterion == "norm-scale" else ("out", "in")
    wanted: dict[str, list[tuple[Group, int]]] = defaultdict(list)
    for group in groups:
        for item in group.slices:
            if item.role in roles:
                wanted[item.weight].append((group, item.dim))
    scores: dict[Atom, Tensor] = {}
    for name, places in wanted.items():
        value = importance[name] if importance is not None else program.weights[name].evaluate()
        sums = _sums(value, {dim for _, dim in places}, criterion)
        for group, dim in places:
            vector = _folded(sums[dim], found.weight(name)[dim], group.atom)
            scores[group.atom] = scores[group.atom] + vector if group.atom in scores else vector
    return {atom: score.sqrt() if criterion == "l2" else score for atom, score in scores.items()}


def _sums(value: Tensor, dims: Collection[int], criterion: Criterion) -> dict[int, Tensor]:
    """Squares (of ``l2``) or magnitudes, summed over everything but each of ``dims``, in float64.

    Made in blocks of rows that stay in the cache: wide copies of large kernels were most of what a pruning held.
    """
    found = {dim: torch.zeros(value.shape[dim], dtype=torch.float64) for dim in dims}
    rows = max(1, BLOCK // max(1, value[0].numel()))
    for start in range(0, len(value), rows):
        block = value[start : start + rows].to(_accumulated(value))
        sizes = block.square() if criterion == "l2" else block.abs()
        for dim, total in found.items():
            others = [other for other in range(value.ndim) if other != dim]
            part = sizes.sum(others) if others else sizes
            (total[start : start + rows] if dim == 0 else total).add_(part)
    return found


def _accumulated(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _folded(vector: Tensor, structure: Structure, atom: Atom) -> Tensor:
    """Per element of ``atom``, what ``vector``, which lies along ``structure``, comes to."""
    places = places_of(structure, atom)
    inside = places >= 0
    return torch.zeros(int(atom.size), dtype=vector.dtype).index_add(0, places[inside], vector[inside])


def places_of(structure: Structure, atom: Atom) -> Tensor:
    """For every element of ``structure``, the index of ``atom`` that it belongs to; -1 where it belongs to none."""
    structure = resolved(structure)
    if isinstance(structure, Atom):
        return torch.arange(structure.size) if structure is atom else torch.full((structure.size,), -1)
    if isinstance(structure, Concatenation):
        return torch.cat([places_of(part, atom) for part in structure.parts])
    found = torch.full((1,), -1)
    for part in structure.parts:
        inner = places_of(part, atom)
        found = torch.maximum(found[:, None], inner[None, :]).flatten()
    return found
