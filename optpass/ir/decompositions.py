"""Lazy weights, decompositions: two matrices around an axis, replaced by the best two around a narrower one.

``first`` [g, c, n] writes the axis of size c, ``second`` [g, m, c] reads it; g batches are apart (heads). Both
expressions here come from the singular values of the products ``second @ first`` = U·S·Vᵀ, cut to ``rank``, and hold
both halves in one tensor, side by side, because one decomposition gives them: :class:`~optpass.ir.weights.Select`
takes either. Source: coupled singular initialisation, MobileVD, arXiv 2412.07583, section "channel funnels".
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor
from torch.nn.functional import pad

from optpass.errors import WeightError
from optpass.ir.weights import Expression, Permute, Select, Shape

RESOLUTION = 1e-12
"""Singular values below this part of the largest are none: float64 resolves no more through a product."""


@dataclass(frozen=True)
class Coupled(Expression):
    """What the decomposition of ``second @ first`` gives, cut to ``rank``: computed in float64, rounded once.

    A rank beyond that of the product is filled with zeros. The values of the last one that was evaluated are kept
    as long as it lives: the halves are asked for one after the other, and the decomposition is what costs.
    """

    first: Expression
    second: Expression
    rank: int

    def __post_init__(self) -> None:
        first, second = self.first.shape, self.second.shape
        fits = len(first) == len(second) == 3 and first[0] == second[0] and first[1] == second[2]
        if not fits or self.rank < 1:
            raise ValueError(f"cannot couple {list(first)} and {list(second)} over an axis of {self.rank}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.first.dtype

    def evaluate(self) -> Tensor:
        """
        Raises:
            WeightError: an operand holds NaN or Inf, which have no singular values.
        """
        # By identity: equal expressions may read a file that has changed.
        if _latest.get(id(self)) is None:
            _latest.clear()
            _latest[id(self)] = self._decomposed(*map(_wide, self.operands())).to(self.dtype)
            finalize(self, _latest.pop, id(self), None)
        return _latest[id(self)]

    def operands(self) -> tuple[Expression, ...]:
        return (self.first, self.second)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}({self.first}, {self.second}, {self.rank})"

    @abstractmethod
    def _decomposed(self, first: Tensor, second: Tensor) -> Tensor:
        """The values, in float64 as ``first`` and ``second`` are."""


_latest: dict[int, Tensor] = {}


class Factors(Coupled):
    """[g, n + m, rank]: (S^½·Vᵀ)ᵀ above U·S^½, which replace ``first`` (transposed) and ``second``.

    Their product is the best approximation of ``second @ first`` of that rank, in the Frobenius norm
    (Eckart & Young 1936).
    """

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.first.shape[0], self.first.shape[2] + self.second.shape[1], self.rank)

    def _decomposed(self, first: Tensor, second: Tensor) -> Tensor:
        (q1, r1), (q2, r2) = torch.linalg.qr(first.mT), torch.linalg.qr(second)
        u, root, v = _cut(r1, r2, self.rank)
        # No inverse of r1 or r2 is needed, so that neither has to have full rank.
        return torch.cat([q1 @ (v * root), q2 @ (u * root)], 1)


class Adaptors(Coupled):
    """[g, 2·c, rank]: F₁ᵀ above F₂, the maps c → rank and rank → c for which F₁·``first`` and ``second``·F₂ are
    the two halves of :class:`Factors`.

    F₁ = S^½·Vᵀ·``first``⁺ and F₂ = ``second``⁺·U·S^½, with the pseudo-inverse, which exists whatever the ranks.
    """

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.first.shape[0], 2 * self.first.shape[1], self.rank)

    def _decomposed(self, first: Tensor, second: Tensor) -> Tensor:
        r1, r2 = (torch.linalg.qr(side, mode="r").R for side in (first.mT, second))
        u, root, v = _cut(r1, r2, self.rank)
        f1, f2 = (torch.linalg.pinv(r, rtol=RESOLUTION) @ side for r, side in ((r1, v * root), (r2, u * root)))
        return torch.cat([f1, f2], 1)


def _wide(operand: Expression) -> Tensor:
    value = operand.evaluate().double()
    if not value.isfinite().all():
        raise WeightError(f"{operand} holds NaN or Inf: it has no singular values")
    return value


def _cut(r1: Tensor, r2: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [g, ·, rank], S^½ [g, 1, rank] and V [g, ·, rank] of ``r2 @ r1ᵀ``, the triangles of both sides."""
    u, values, vh = torch.linalg.svd(r2 @ r1.mT, full_matrices=False)
    values = values.where(values > RESOLUTION * values[:, :1], 0.0)
    u, v = _signed(u, vh.mT)
    missing = max(0, rank - values.shape[1])
    u, values, v = (pad(part, (0, missing))[..., :rank] for part in (u, values, v))
    return u, values.sqrt()[:, None], v


def _signed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with the largest entry of each of ``v`` positive: their signs are free, and libraries differ."""
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(v.dtype)
    return u * sign, v * sign


def halves(coupled: Coupled, split: int) -> tuple[Expression, Expression]:
    """What belongs to ``first``, [g, rank, split], and what belongs to ``second``, [g, rest, rank]."""
    size = coupled.shape[1]
    first, second = Select(coupled, 1, tuple(range(split))), Select(coupled, 1, tuple(range(split, size)))
    return Permute(first, (0, 2, 1)), second
