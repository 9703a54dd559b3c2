"""The table of a module's timesteps: found again by content, bounded in bytes."""

from __future__ import annotations

import torch

from optpass.runtime.tables import Table


def counted(table, made, entry="embed", **given):
    def make():
        made.append(given)
        return {"row": torch.full((4,), float(next(iter(given.values())).flatten()[0]))}

    return table.row(entry, given, make)


def test_rows_are_found_by_content():
    table, made = Table(), []
    first = counted(table, made, timestep=torch.tensor(3.0))
    assert counted(table, made, timestep=torch.tensor(3.0)) is first
    others = [
        counted(table, made, timestep=torch.tensor(4.0)),
        # Neither a shape nor a dtype of its own, another input, or another entry is the same question.
        counted(table, made, timestep=torch.tensor([3.0])),
        counted(table, made, timestep=torch.tensor(3.0, dtype=torch.float64)),
        counted(table, made, timestep=torch.tensor(3.0), label=torch.tensor(1)),
        counted(table, made, "other", timestep=torch.tensor(3.0)),
    ]
    assert len(made) == 1 + len(others)


def test_the_row_that_rested_longest_goes():
    table, made = Table(largest=2 * 4 * 4), []
    for time in (1.0, 2.0, 1.0, 3.0):
        counted(table, made, timestep=torch.tensor(time))
    made.clear()
    counted(table, made, timestep=torch.tensor(1.0))
    assert made == []
    counted(table, made, timestep=torch.tensor(2.0))
    assert len(made) == 1


def test_a_row_larger_than_the_table_serves_its_step():
    table, made = Table(largest=1), []
    for _ in range(2):
        counted(table, made, timestep=torch.tensor(1.0))
    assert len(made) == 1
