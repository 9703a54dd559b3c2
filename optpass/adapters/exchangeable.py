"""Adapters in slots: merged weights that are made again, or low-rank branches whose factors are swapped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optpass.adapters.adaptation import Adaptation, merged
from optpass.adapters.planning import Adaptations
from optpass.errors import UserError
from optpass.ir.algebra import Full, Pad
from optpass.ir.slots import Slot
from optpass.ir.weights import Cast, Concat, Expression, Shape

MERGED, DOWN, UP = "merged", "down", "up"
"""Roles: a weight with adapters in it; the two layers of a branch, [R, in, k…] and [out, R, 1…]."""


def merged_slot(name: str, base: Expression, adaptations: Adaptations, content: str) -> Slot:
    """The merged weight, in a slot whose content without an adapter is ``base``."""
    return Slot(name, MERGED, base, content_of(MERGED, base, base.shape, adaptations), content)


@dataclass(frozen=True)
class Branch:
    """Room for adapters of rank ``rank`` together beside a weight of ``shape`` and ``dtype``."""

    weight: str
    shape: Shape
    dtype: torch.dtype
    rank: int

    def holding(self, adaptations: Adaptations, content: str) -> Adaptation:
        """A LoRA whose two layers are slots that hold ``adaptations``, their scales included.

        Raises:
            UserError: an adaptation is not of low rank, or they take more rank than there is.
        """
        shapes = {DOWN: (self.rank, *self.shape[1:]), UP: (self.shape[0], self.rank, *(1,) * (len(self.shape) - 2))}
        factors = {}
        for role, shape in shapes.items():
            base = Full(shape, 0.0, self.dtype)
            value = content_of(role, base, self.shape, adaptations)
            factors[role] = Slot(self.weight, role, base, value, content)
        keys = {role: f"{self.weight} ({role})" for role in factors}
        return Adaptation("lora", factors, alpha=float(self.rank), rank=self.rank, keys=keys)


def content_of(role: str, base: Expression, shape: Shape, adaptations: Adaptations) -> Expression:
    """What a slot of ``role`` over a weight of ``shape`` holds; ``base`` itself where nothing adapts the weight.

    Raises:
        UserError: an adaptation does not fit the weight, or the room for branches.
    """
    if not adaptations:
        return base
    if role == MERGED:
        return merged(base, adaptations)
    for adaptation, _ in adaptations:
        _check_low_rank(adaptation)
    layers = [adaptation.low_rank(shape, strength) for adaptation, strength in adaptations]
    parts = tuple(layer[0 if role == DOWN else 1] for layer in layers)
    axis = 0 if role == DOWN else 1
    whole = parts[0] if len(parts) == 1 else Concat(parts, axis)
    return _padded(whole, base, axis, adaptations[0][0])


def needed_rank(adaptations: Adaptations) -> int:
    """The rank that a branch needs for all of ``adaptations``."""
    return sum(adaptation.rank for adaptation, _ in adaptations)


def _check_low_rank(adaptation: Adaptation) -> None:
    kind = "DoRA" if adaptation.magnitude is not None else {"loha": "LoHa", "lokr": "LoKr"}.get(adaptation.kind)
    if kind:
        raise UserError(
            f"{adaptation.key}: {kind} is no pair of low-rank layers to keep beside the weight; use mode: refit"
        )


def _padded(whole: Expression, base: Expression, axis: int, adaptation: Adaptation) -> Expression:
    missing = base.shape[axis] - whole.shape[axis]
    if missing < 0:
        raise UserError(
            f"{adaptation.key}: the adapters take rank {whole.shape[axis]} together, and the engine keeps room for "
            f"{base.shape[axis]}; build it with merge-lora: {{mode: keep, rank: {whole.shape[axis]}}}"
        )
    if missing:
        after = tuple(missing if dim == axis else 0 for dim in range(len(base.shape)))
        whole = Pad(whole, (0,) * len(base.shape), after)
    return whole if whole.dtype == base.dtype else Cast(whole, base.dtype)
