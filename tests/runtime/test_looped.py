"""What comes back from a looped Program: the schedule's results, whoever calls and in whatever order."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from loops import Eager, cached, denoiser, generation

from optpass.errors import UserError
from optpass.ir.loop import Cycle, Listed, every
from optpass.runtime import generations
from optpass.runtime.looped import LoopModule, program_module

CONTEXT, OTHER = torch.randn(2, 3), torch.randn(2, 3)


def looped(program: Any) -> LoopModule:
    module = program_module(program)
    assert isinstance(module, LoopModule)
    return module


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_period_is_what_an_eager_cache_gives(period):
    program, net = cached(every(period, ("full", "reuse")))
    module = looped(program)
    expected = generation(Eager(net, lambda step: step % period == 0), 0, 10, CONTEXT)
    assert_equal(generation(module, 0, 10, CONTEXT), expected)
    computed = -(-10 // period)
    assert module.statistics == {key: n for key, n in {"full": computed, "reuse": 10 - computed}.items() if n}


def test_listed_steps_are_computed():
    program, net = cached(Listed((0, 1, 4), of=6))
    expected = generation(Eager(net, lambda step: step in (0, 1, 4)), 0, 6, CONTEXT)
    assert_equal(generation(looped(program), 0, 6, CONTEXT), expected)


def test_outside_of_its_timesteps_a_schedule_computes():
    program, net = cached(Cycle(("full", "reuse"), within=(300.0, 700.0)))
    times = [999 - index * 99.9 for index in range(10)]
    expected = generation(Eager(net, lambda i: not (300 <= times[i] <= 700) or i % 2 == 0), 0, 10, CONTEXT)
    assert_equal(generation(looped(program), 0, 10, CONTEXT), expected)


def test_period_one_is_the_module_itself_to_the_bit():
    whole = generation(program_module(denoiser()[0]), 3, 7, CONTEXT)
    assert_equal(generation(looped(cached(every(1, ("full", "reuse")))[0]), 3, 7, CONTEXT), whole)


def test_a_generation_that_was_broken_off_leaves_nothing_behind():
    program, net = cached()
    module = looped(program)
    generation(module, 0, 3, CONTEXT)
    expected = generation(Eager(net, lambda step: step % 2 == 0), 5, 6, CONTEXT)
    assert_equal(generation(module, 5, 6, CONTEXT), expected)


@pytest.mark.parametrize("broken_off_after", [1, 2, 3])
def test_the_same_seed_with_fewer_steps_starts_anew(broken_off_after):
    """What was broken off has the noise, the conditioning and an earlier time; all that says otherwise is the start."""
    program, net = cached(every(3, ("full", "reuse")))
    module = looped(program)
    generation(module, 0, 50, CONTEXT, stop=broken_off_after)
    expected = generation(Eager(net, lambda step: step % 3 == 0), 0, 10, CONTEXT, first=950.0)
    assert_equal(generation(module, 0, 10, CONTEXT, first=950.0), expected)


def test_another_noise_over_the_same_image_starts_anew():
    """Image to image: the first samples of two seeds are like each other, and at one time."""
    program, net = cached()
    module = looped(program)
    image, noise = torch.ones(2, 4), torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    first, second = image + 0.7 * noise, image - 0.7 * noise
    assert torch.cosine_similarity(first.flatten(), second.flatten(), dim=0) > generations.CORRELATION
    module(first, torch.tensor(500.0), CONTEXT)
    question = second, torch.tensor(500.0), CONTEXT
    assert torch.equal(module(*question), Eager(net, lambda step: True)(*question))


def test_another_number_of_steps_serves_a_period():
    program, net = cached()
    module = looped(program)
    for steps in (4, 9, 5):
        expected = generation(Eager(net, lambda step: step % 2 == 0), 1, steps, CONTEXT)
        assert_equal(generation(module, 1, steps, CONTEXT), expected)


def test_the_same_question_twice_has_the_same_answer():
    module = looped(cached()[0])
    question = torch.randn(2, 4), torch.tensor(500.0), CONTEXT
    assert torch.equal(module(*question), module(*question))
    assert module.statistics == {"full": 2}


def test_a_time_that_is_evaluated_twice_goes_on():
    """PNDM and Heun call the model twice at one timestep, with another sample."""
    program, net = cached()
    times = [900.0, 800.0, 800.0, 700.0, 600.0]
    expected, found = Eager(net, lambda step: step % 2 == 0), looped(program)
    sample = torch.randn(2, 4)
    for time in times:
        question = sample, torch.tensor(time), CONTEXT
        assert torch.equal(found(*question), expected(*question))
        sample = sample + 0.01
    assert found.statistics == {"full": 3, "reuse": 2}


def test_guidance_in_two_calls_a_step():
    program, net = cached()
    module, with_context = looped(program), Eager(net, lambda step: step % 2 == 0)
    without = Eager(net, lambda step: step % 2 == 0)
    sample = torch.randn(2, 4)
    for index in range(6):
        time = torch.tensor(900.0 - 100 * index)
        one, two = module(sample, time, CONTEXT), module(sample, time, OTHER)
        assert torch.equal(one, with_context(sample, time, CONTEXT))
        assert torch.equal(two, without(sample, time, OTHER))
        sample = sample - 0.05 * (two + 2 * (one - two))
    assert module.statistics == {"full": 6, "reuse": 6}


def test_guidance_in_two_calls_of_one_conditioning():
    program, net = cached()
    module, expected = looped(program), Eager(net, lambda step: step % 2 == 0)
    sample = torch.randn(2, 4)
    for index in range(4):
        time = torch.tensor(900.0 - 100 * index)
        answer = expected(sample, time, CONTEXT)
        for _ in range(2):
            assert torch.equal(module(sample, time, CONTEXT), answer)
        sample = sample - 0.05 * answer
    assert module.statistics == {"full": 4, "reuse": 4}


@pytest.mark.parametrize("shared", [False, True], ids=["fork", "one module"])
def test_two_pipelines_in_turn(shared):
    """With other conditioning one module does; with the same, samples tell them apart, and a fork is certain."""
    program, net = cached()
    first = looped(program)
    second = first if shared else first.fork()
    contexts = (CONTEXT, OTHER) if shared else (CONTEXT, CONTEXT)
    eager = [Eager(net, lambda step: step % 2 == 0) for _ in contexts]
    samples = [torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    for index in range(6):
        time = torch.tensor(900.0 - 100 * index)
        for side, module in enumerate((first, second)):
            answer = module(samples[side], time, contexts[side])
            assert torch.equal(answer, eager[side](samples[side], time, contexts[side]))
            samples[side] = samples[side] - 0.05 * answer


def test_two_generations_of_one_conditioning_in_one_module_are_told_apart_by_their_samples():
    program, net = cached()
    module = looped(program)
    eager = [Eager(net, lambda step: step % 2 == 0) for _ in range(2)]
    start = torch.randn(2, 4)
    samples = [start, -start]
    for side, index in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (1, 3), (0, 3)]:
        time = torch.tensor(900.0 - 100 * index)
        answer = module(samples[side], time, CONTEXT)
        assert torch.equal(answer, eager[side](samples[side], time, CONTEXT))
        samples[side] = samples[side] - 0.01 * answer


def test_two_threads():
    program, net = cached()
    module = looped(program)
    found: dict[int, Any] = {}

    def run(seed: int) -> None:
        found[seed] = generation(module, seed, 30, CONTEXT)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answers in found.items():
        assert_equal(answers, generation(Eager(net, lambda step: step % 2 == 0), seed, 30, CONTEXT))


def test_more_threads_than_a_few_take_turns():
    """As many generations as threads are in progress at a time."""
    program, net = cached()
    module, found = looped(program), dict[int, Any]()
    count = 12
    turn = threading.Barrier(count)

    def call(*question: torch.Tensor) -> torch.Tensor:
        turn.wait(timeout=60)
        answer: torch.Tensor = module(*question)
        return answer

    threads = [
        threading.Thread(target=lambda seed=seed: found.__setitem__(seed, generation(call, seed, 6, CONTEXT)))
        for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answers in found.items():
        assert_equal(answers, generation(Eager(net, lambda step: step % 2 == 0), seed, 6, CONTEXT))
    module(torch.randn(2, 4), torch.tensor(999.0), CONTEXT)
    assert len(module.runner.generations._open) == 1, "what ended threads kept is freed"


def test_conditioning_that_changes_starts_anew():
    program, net = cached()
    module = looped(program)
    sample = torch.randn(2, 4)
    module(sample, torch.tensor(900.0), CONTEXT)
    sample = sample + torch.randn(2, 4) / 100
    expected = Eager(net, lambda step: True)(sample, torch.tensor(800.0), OTHER)
    assert torch.equal(module(sample, torch.tensor(800.0), OTHER), expected)


def test_the_callers_tensors_may_be_written_over():
    program, net = cached()
    module, expected = looped(program), Eager(net, lambda step: step % 2 == 0)
    sample, context = torch.randn(2, 4), CONTEXT.clone()
    assert torch.equal(module(sample, torch.tensor(900.0), context), expected(sample, torch.tensor(900.0), context))
    context += 1
    sample += torch.randn(2, 4) / 100
    fresh = Eager(net, lambda step: True)
    assert torch.equal(module(sample, torch.tensor(800.0), context), fresh(sample, torch.tensor(800.0), context))


def test_the_answer_may_be_written_over():
    program, net = cached()
    module, expected = looped(program), Eager(net, lambda step: step % 2 == 0)
    sample = torch.randn(2, 4)
    for index in range(4):
        question = sample.clone(), torch.tensor(900.0 - index), CONTEXT
        answer = module(*question)
        assert torch.equal(answer, expected(*question))
        answer.fill_(torch.nan)
        sample += 0.01 * torch.randn(2, 4)


def test_another_batch_is_refused_and_nothing_is_lost():
    module = looped(cached()[0])
    generation(module, 0, 2, CONTEXT)
    with pytest.raises(UserError, match=r"--inputs sample=3x4"):
        module(torch.randn(3, 4), torch.tensor(1.0), torch.randn(3, 3))


def test_more_steps_than_a_list_is_for_are_refused():
    module = looped(cached(Listed((0, 2), of=4))[0])
    with pytest.raises(UserError, match="made for 4 steps"):
        generation(module, 0, 5, CONTEXT)
    with pytest.raises(UserError, match="which of 4 steps are computed, and does not serve 7"):
        module.steps = 7


def test_what_a_pipeline_says_of_its_calls():
    """diffusers names the calls of a step, and some pipelines number the steps."""
    program, net = cached()
    module = looped(program)
    eager = {name: Eager(net, lambda step: step % 2 == 0) for name in ("cond", "uncond")}
    sample = torch.randn(2, 4)
    for index in range(4):
        time = torch.tensor(900.0 - 100 * index)
        for name in ("cond", "uncond"):
            with module.cache_context(name, step_index=index, num_inference_steps=4):
                assert torch.equal(module(sample, time, CONTEXT), eager[name](sample, time, CONTEXT))
        sample = sample - 0.01
    with module.cache_context("cond", step_index=0):
        assert torch.equal(module(sample, torch.tensor(1.0), CONTEXT), Eager(net, lambda _: True)(sample, 1.0, CONTEXT))


def test_a_list_refuses_another_number_of_steps_that_the_pipeline_says():
    module = looped(cached(Listed((0, 2), of=4))[0])
    with (
        module.cache_context("cond", step_index=0, num_inference_steps=9),
        pytest.raises(UserError, match="which of 4 steps are computed, and does not serve 9"),
    ):
        module(torch.randn(2, 4), torch.tensor(900.0), CONTEXT)


def test_what_a_finished_generation_kept_is_freed():
    module = looped(cached()[0])
    generation(module, 0, 4, CONTEXT)
    kept = weakref.ref(module.runner.generations._open[0])
    generation(module, 1, 17, CONTEXT)
    assert kept() is None
    assert len(module.runner.generations._open) == 1


def test_reset_forgets():
    module = looped(cached()[0])
    sample = torch.randn(2, 4)
    module(sample, torch.tensor(900.0), CONTEXT)
    module.reset()
    module(sample + torch.randn(2, 4) / 100, torch.tensor(800.0), CONTEXT)
    assert module.statistics == {"full": 2}


def test_a_call_that_fails_ends_its_generation():
    module = looped(cached()[0])
    sample = torch.randn(2, 4)
    noise = torch.randn(2, 4) / 100
    module(sample, torch.tensor(900.0), CONTEXT)
    run = module.runner.runners["reuse"]
    module.runner.runners["reuse"] = lambda tensors: 1 / 0  # type: ignore[index]
    with pytest.raises(ZeroDivisionError):
        module(sample + noise, torch.tensor(800.0), CONTEXT)
    module.runner.runners["reuse"] = run  # type: ignore[index]
    module(sample + 2 * noise, torch.tensor(700.0), CONTEXT)
    assert module.statistics == {"full": 2, "reuse": 1}


def test_timesteps_that_ascend_are_an_option():
    program, net = cached()
    module, expected = looped(program), Eager(net, lambda step: step % 2 == 0)
    module.ascending = True
    sample = torch.randn(2, 4)
    for time in (1.0, 2.0, 3.0):
        question = sample, torch.tensor(time), CONTEXT
        assert torch.equal(module(*question), expected(*question))
        sample = sample + torch.randn(2, 4) / 100


def test_a_module_that_never_reuses_says_why(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(generations.log, "warning", lambda text, *values: said.append(text % values))
    module = looped(cached()[0])
    for index in range(6):
        module(torch.randn(2, 4), torch.tensor(float(index)), CONTEXT)
    assert [line for line in said if "4 calls in a row each started a generation" in line] == said
    assert len(said) == 1
