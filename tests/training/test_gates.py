"""Sampling of exactly n of N units: the counts always, the inclusion probabilities in the mean, the gradient."""

from __future__ import annotations

import pytest
import torch

from optpass.training.gates import FLOOR, SampledGates, inclusion_probabilities, sample

IMPORTANCES = {
    "equal": ([1.0] * 6, 2),
    "one certain": ([10.0, 1, 1, 1, 0.5], 2),
    "several certain": ([5.0, 4, 0.1, 0.1, 0.1], 3),
    "all": ([0.3, 2, 1], 3),
    "none": ([0.3, 2, 1], 0),
    "below the floor": ([-1.0, 0, 1, 2], 2),
    "wide": (torch.rand(38, generator=torch.Generator().manual_seed(5)).tolist(), 11),
}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_probabilities(name):
    values, count = IMPORTANCES[name]
    q = torch.tensor(values)
    p = inclusion_probabilities(q, count)
    assert float(p.sum()) == pytest.approx(count, abs=1e-5)
    assert float(p.min()) >= 0
    assert float(p.max()) <= 1
    # clip(c·q, 0, 1) for one c: below 1, probabilities are to one another as importances.
    free = p < 1
    ratios = (p / q.clamp_min(FLOOR))[free]
    if count and len(ratios):
        torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios))
        assert bool((q[~free] * ratios.mean() >= 1 - 1e-5).all())


@pytest.mark.parametrize("name", IMPORTANCES)
def test_draws(name):
    """Exactly n in every draw; each unit as often as its probability, within 5 standard deviations."""
    values, count = IMPORTANCES[name]
    p = inclusion_probabilities(torch.tensor(values), count)
    generator, draws = torch.Generator().manual_seed(0), 3000
    drawn = torch.stack([sample(p, generator) for _ in range(draws)])
    assert set(drawn.sum(1).tolist()) == {count}
    spread = (p * (1 - p) / draws).sqrt()
    assert bool(((drawn.float().mean(0) - p).abs() <= 5 * spread + 1e-6).all())


def test_gates_are_zero_or_one_and_carry_the_gradient_of_the_probabilities():
    gates = SampledGates(5, 2)
    with torch.no_grad():
        gates.importances.copy_(torch.tensor([0.2, 0.5, 0.7, 0.4, 0.3]))
    z = gates(torch.Generator().manual_seed(1))
    assert sorted(z.tolist()) == [0, 0, 0, 1, 1]
    weights = torch.arange(5.0)
    (weights * z).sum().backward()
    q = gates.importances.detach().requires_grad_()
    (weights * inclusion_probabilities(q, 2)).sum().backward()
    torch.testing.assert_close(gates.importances.grad, q.grad)
    assert bool((q.grad != 0).all())


def test_what_fell_below_the_floor_is_still_learned():
    q = torch.tensor([1.0, -1.0, 2.0, 0.5 * FLOOR], requires_grad=True)
    p = inclusion_probabilities(q, 2)
    (p[1] + p[3]).backward()
    assert float(p.detach()[1]) == float(p.detach()[3]) > 0
    assert float(q.grad[1]) == float(q.grad[3]) > 0


def test_learning_finds_the_units_that_matter():
    """Of six units whose absence costs differently, the two that cost most get the largest importances."""
    torch.manual_seed(0)
    costs = torch.tensor([0.1, 3.0, 0.2, 0.1, 2.0, 0.3])
    gates, generator = SampledGates(6, 2), torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(gates.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        (costs * (1 - gates(generator))).sum().backward()
        optimiser.step()
    assert set(gates.importances.topk(2).indices.tolist()) == {1, 4}


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_out_of_range(count):
    with pytest.raises(ValueError, match="cannot sample"):
        SampledGates(3, count)
