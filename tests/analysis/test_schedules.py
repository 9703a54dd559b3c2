from __future__ import annotations

from itertools import combinations

import pytest
import torch

from optpass.analysis.schedules import computed_steps


def unseen(changes, chosen):
    total, last = 0.0, 0
    for step in range(len(changes)):
        last = step if step in chosen else last
        total += 0.0 if step in chosen else float(changes[last, step])
    return total


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_leaves_less(seed):
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(9, 9, generator=generator)
    for count in range(1, 10):
        chosen = computed_steps(changes, count)
        assert len(chosen) == count
        assert chosen == tuple(sorted(set(chosen)))
        every = [(0, *rest) for rest in combinations(range(1, 9), count - 1)]
        assert unseen(changes, chosen) == pytest.approx(min(unseen(changes, each) for each in every))


def test_equal_changes_are_spread_evenly():
    """A value that moves on at one speed: its distance from the last computed step grows linearly."""
    steps = torch.arange(12.0)
    chosen = computed_steps((steps[None] - steps[:, None]).abs(), 4)
    assert chosen == (0, 3, 6, 9)


def test_where_it_changes_is_computed():
    value = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 9.0, 9.0])
    assert computed_steps((value[None] - value[:, None]).abs(), 3) == (0, 3, 6)


def test_what_is_no_number_is_avoided():
    changes = torch.ones(4, 4)
    changes[:, 2] = torch.nan
    assert computed_steps(changes, 2) == (0, 2)
    assert computed_steps(torch.full((3, 3), torch.nan), 1) == (0,)


def test_impossible_counts():
    for count in (0, 4):
        with pytest.raises(ValueError, match="of 3 steps"):
            computed_steps(torch.zeros(3, 3), count)
