"""Noise, clean samples and steps against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from optpass.errors import UserError
from optpass.training.diffusion import Diffusion

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(kind: str, **options: object) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=kind,
        clip_sample=False,
        **{"timestep_spacing": "trailing", **options},
    )


def drawn(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 4, generator=generator) for _ in range(count)]


def test_noised_as_the_scheduler_does() -> None:
    clean, noise = drawn(2)
    timesteps = torch.tensor([10, 700])
    made = Diffusion.of(scheduler("epsilon"), 4)
    assert made.timesteps == (999, 749, 499, 249)
    torch.testing.assert_close(
        made.noised(clean, noise, timesteps), scheduler("epsilon").add_noise(clean, noise, timesteps)
    )
    assert torch.equal(made.noised(clean, noise, torch.tensor([999, 999])), noise)


def test_velocities_are_the_schedulers() -> None:
    clean, noise = drawn(2)
    timesteps = torch.tensor([10, 700])
    expected = scheduler("v_prediction").get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(Diffusion.of(scheduler("v_prediction"), 4).answer(clean, noise, timesteps), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_leads_back(kind: str) -> None:
    clean, noise = drawn(2)
    made, timesteps = Diffusion.of(scheduler(kind), 4), torch.tensor([100, 600])
    sample, answer = made.noised(clean, noise, timesteps), made.answer(clean, noise, timesteps)
    torch.testing.assert_close(made.clean(sample, answer, timesteps), clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.noise(sample, answer, timesteps), noise, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_ddims(kind: str) -> None:
    sample, answer = drawn(2)
    own = scheduler(kind)
    made = Diffusion.of(own, 4)
    for timestep, following in ((749, 499), (249, -1)):
        expected = own.step(answer, timestep, sample).prev_sample
        found = made.stepped(sample, answer, torch.tensor([timestep] * 2), torch.tensor([following] * 2))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(), "preserves variance"),
        (
            lambda: EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="leading"),
            "starts at timestep",
        ),
        (lambda: scheduler("epsilon", timestep_spacing="leading"), "set timestep_spacing to 'trailing'"),
    ],
    ids=["flow", "leading", "one step from the middle"],
)
def test_what_it_cannot_speak_of_is_refused(made: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Diffusion.of(made(), 1)  # type: ignore[operator]


def test_steps_are_halved() -> None:
    made = Diffusion.of(scheduler("epsilon"), 2)
    assert made.timesteps == (999, 499)
    assert made.refined(1) == (999, 499)
    assert made.refined(4) == (999, 874, 749, 624, 499, 374, 249, 124)
    assert Diffusion.of(scheduler("epsilon"), 8).timesteps == made.refined(4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [200, -1])
def test_two_steps_in_one(kind: str, last: int) -> None:
    made = Diffusion.of(scheduler(kind), 4)
    sample, one, other = drawn(3)
    first, middle, end = (torch.tensor([t, t]) for t in (900, 600, last))
    nearer = made.stepped(sample, one, first, middle)
    there = made.stepped(nearer, other, middle, end)
    clean = made.leading(sample, there, first, end)
    # The sampler itself, with a model that predicts this clean sample.
    as_sample = Diffusion.of(scheduler("sample"), 4)
    torch.testing.assert_close(as_sample.stepped(sample, clean, first, end), there, atol=1e-5, rtol=1e-5)


def test_signal_to_noise_is_the_schedules() -> None:
    made, timesteps = Diffusion.of(scheduler("epsilon"), 4), torch.tensor([100, 900])
    cumulated = scheduler("epsilon").alphas_cumprod[timesteps]
    torch.testing.assert_close(made.signal_to_noise(timesteps), cumulated / (1 - cumulated), rtol=1e-4, atol=0)
