"""How many elements of an atom may go: whole multiples, where group norms and vector units ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import lcm

from optpass.analysis.axes.axes import Axes
from optpass.analysis.axes.structure import Atom, atoms, resolved


def norm_groups(found: Axes) -> dict[Atom, int]:
    """For every atom under group norms, the number of channels that must go at a time.

    What goes in multiples of the number of groups leaves every concatenation divisible that was so before.
    """
    steps: dict[Atom, int] = {}
    for item in found.normalised:
        if item.groups > 1:
            for atom in atoms(item.structure):
                steps[atom] = lcm(steps.get(atom, 1), item.groups)
    return steps


def blocks(found: Axes, all_steps: Mapping[Atom, int]) -> dict[Atom, int]:
    """For every atom that is all that some group norm sees, into how many equal blocks its groups cut it.

    As many channels from each block keep every other channel in its group.
    """
    result: dict[Atom, int] = {}
    for item in found.normalised:
        whole = resolved(item.structure)
        if item.groups > 1 and isinstance(whole, Atom):
            count = lcm(result.get(whole, 1), item.groups)
            if whole.size % count == 0 and all_steps.get(whole, 1) % count == 0:
                result[whole] = count
    return result


def removable(size: int, most: float, step: int, multiple: int = 1) -> int:
    """The largest number up to ``most`` that is a multiple of ``step`` and leaves a multiple of ``multiple``.

    Something is always left. 0 where no other number will do.
    """
    candidates: Iterable[int] = range(int(min(most, size - 1)) // step * step, 0, -step)
    return next((count for count in candidates if (size - count) % multiple == 0), 0)
