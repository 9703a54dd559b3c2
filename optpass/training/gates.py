"""Learned importances of units by sampling which of them run: exactly n of N, with given inclusion probabilities.

Each unit's branch is multiplied by a gate z ∈ {0, 1}. In every iteration exactly n gates are open, unit i with
probability pᵢ = clip(c·qᵢ, 0, 1), Σp = n; the straight-through estimator z = hard + (p − detach(p)) carries the
gradient to the importances q. After training the n largest stay (``prune-blocks`` with ``importance: gates``).

Source: learned temporal block pruning of MobileVD, arXiv 2412.07583, figure 4; sampling without replacement with
unequal probabilities: Madow 1949 (systematic), after a random permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 1e-4
"""Smallest importance: what is never sampled would never be learned again."""


def inclusion_probabilities(importances: Tensor, count: int) -> Tensor:
    """p [N] = clip(c·q, 0, 1) with c such that Σp = ``count``, for importances q [N]; differentiable in q.

    Importances below :data:`FLOOR` count as that, with the gradient that they would have there.

    Raises:
        ValueError: ``count`` is not in 0 … N.
    """
    if not 0 <= count <= len(importances):
        raise ValueError(f"cannot sample {count} of {len(importances)} units")
    # A clamp alone has no gradient below the floor: what fell there would never be learned again.
    q = importances.detach().clamp_min(FLOOR) + (importances - importances.detach())
    certain = _certain(q.detach(), count)
    free = torch.where(certain, 0.0, q)
    share = (count - int(certain.sum())) * free / free.sum().clamp_min(torch.finfo(q.dtype).tiny)
    return torch.where(certain, 1.0, share)


def _certain(q: Tensor, count: int) -> Tensor:
    """Which probabilities are clipped at 1: the k largest q, the smallest k that leaves nothing above 1."""
    ordered, places = q.sort(descending=True)
    taken = torch.arange(len(q))
    rest = ordered.flip(0).cumsum(0).flip(0)
    fits = ordered * (count - taken) <= rest
    k = min(int(fits.int().argmax()) if bool(fits.any()) else count, count)
    certain = torch.zeros_like(q, dtype=torch.bool)
    certain[places[:k]] = True
    return certain


def sample(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw [N], bool, of exactly Σp units without replacement, unit i among them with probability pᵢ.

    Σp is a whole number. Systematic sampling over a random order: one uniform offset, then every whole step along
    the cumulated probabilities.
    """
    p = probabilities.detach().double()
    order = torch.randperm(len(p), generator=generator)
    ends = p[order].cumsum(0)
    if len(p):
        # The sum is whole but for rounding, on which the last unit must not depend.
        ends[-1] = ends[-1].round()
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    passed = (ends - offset).ceil()
    drawn = torch.zeros(len(p), dtype=torch.bool)
    drawn[order] = passed.diff(prepend=torch.zeros(1, dtype=torch.float64)) > 0
    return drawn


class SampledGates(nn.Module):
    """N gates of which exactly ``count`` are open in each call; learns ``importances`` [N], which begin at 1."""

    def __init__(self, number: int, count: int) -> None:
        """
        Raises:
            ValueError: ``count`` is not in 0 … ``number``.
        """
        super().__init__()
        self.importances = nn.Parameter(torch.ones(number))
        self.count = count
        inclusion_probabilities(self.importances, count)

    def forward(self, generator: torch.Generator | None = None) -> Tensor:
        """z [N]: 0 or 1 going forward, with the gradient of the inclusion probabilities."""
        p = inclusion_probabilities(self.importances, self.count)
        return sample(p, generator).to(p.dtype) + (p - p.detach())
