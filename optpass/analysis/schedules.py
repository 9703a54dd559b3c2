"""Which steps to compute, when the others reuse what the last computed one left: exact, from measured changes."""

from __future__ import annotations

import torch
from torch import Tensor


def computed_steps(changes: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` steps, of which the first is 0, that leave the least change unseen.

    ``changes[i, j]`` is how far what step j would compute lies from what step i computed; the sum of
    ``changes[last(j), j]`` over the steps j that reuse is minimised, by dynamic programming over the number of steps
    computed and the last of them. What is not finite is chosen only where nothing else is left. O(count · n²).

    Raises:
        ValueError: ``count`` is not in 1 … n.
    """
    steps = len(changes)
    if not 1 <= count <= steps:
        raise ValueError(f"{count} of {steps} steps cannot be computed")
    skipped = _skipped(changes)
    best = skipped.new_full((steps,), torch.inf)
    best[0] = 0.0
    before: list[Tensor] = []
    for _ in range(count - 1):
        # From each last computed step (row) to each next one (column).
        best, chosen = (best[:, None] + skipped[:, :steps]).min(0)
        before.append(chosen)
    last = int((best + skipped[:, steps]).argmin())
    found = [last]
    for chosen in reversed(before):
        found.append(int(chosen[found[-1]]))
    return tuple(reversed(found))


def _skipped(changes: Tensor) -> Tensor:
    """[n, n + 1]: the change unseen between a computed step and the next one, infinite unless that is later."""
    steps = len(changes)
    finite = changes.double()
    largest = finite[finite.isfinite()].abs().sum() + 1
    finite = torch.where(finite.isfinite(), finite, largest)
    later = torch.ones(steps, steps + 1, dtype=torch.bool).triu(1)
    # Column k is the next computed step: the sum over the steps before it.
    totals = torch.zeros(steps, steps + 1, dtype=torch.float64)
    totals[:, 1:] = (finite * later[:, :steps]).cumsum(1)
    return torch.where(later, totals, torch.inf)
