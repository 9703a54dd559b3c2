from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.capture.sources import capture
from optpass.errors import MissingValuesError
from optpass.evaluate.importance import random_calls, sampled_calls, taylor_importance
from optpass.ir.loop import LOOP
from optpass.ir.weights import Absent
from optpass.passes.cache_features import CacheFeatures
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked


class Net(nn.Module):
    """A channel that nothing reads, and an embedding table whose rows are partly looked up."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)
        self.table = nn.Embedding(7, 6)

    def forward(self, x, index):
        return self.outer(torch.relu(self.inner(x + self.table(index))) * torch.tensor([1.0, 1, 0, 1, 1]))


def inputs():
    return {"x": torch.randn(4, 6), "index": torch.zeros(4, dtype=torch.int64)}


def test_it_is_the_weight_times_the_gradient(capture_module):
    program, module = capture_module(Net, **inputs())
    calls = random_calls(program, 2, seed=3)
    found = taylor_importance(program, calls, seed=5)
    generator, expected = torch.Generator().manual_seed(5), {}
    for each in calls["full"]:
        y = module(**each)
        loss = (y * torch.randn(y.shape, generator=generator)).sum() / y.detach().norm()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        for (name, weight), gradient in zip(module.named_parameters(), gradients, strict=True):
            expected[name] = expected.get(name, 0) + (weight * gradient).abs().detach() / 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert found["inner.weight"][2].count_nonzero() == 0
    assert found["inner.weight"][0].count_nonzero() > 0


def test_seeded_and_the_program_stays(capture_module):
    program, _ = capture_module(Net, **inputs())
    before = program.weights["inner.weight"].evaluate().clone()
    first, second = (taylor_importance(program, random_calls(program, 2), seed=1) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = taylor_importance(program, random_calls(program, 2), seed=2)
    assert not torch.equal(other["outer.weight"], first["outer.weight"])
    weight = program.weights["inner.weight"].evaluate()
    assert torch.equal(weight, before)
    assert not weight.requires_grad


def test_it_ranks_channels_by_what_their_removal_changes(capture_module):
    program, module = capture_module(Net, **inputs())
    calls = random_calls(program, 64)
    importance = taylor_importance(program, calls)["outer.weight"].sum(0)
    changes = []
    with torch.no_grad():
        for channel in range(5):
            weight = module.outer.weight.clone()
            before = [module(**each) for each in calls["full"]]
            module.outer.weight[:, channel] = 0
            after = [module(**each) for each in calls["full"]]
            changes.append(sum(float((a - b).norm()) for a, b in zip(after, before, strict=True)))
            module.outer.weight.copy_(weight)
    ranks = [torch.as_tensor(values).argsort().argsort().float() for values in (importance, changes)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] >= 0.9


def test_half_precision_counts_in_float32(capture_module):
    program, _ = capture_module(lambda: Net().bfloat16(), x=torch.randn(4, 6).bfloat16(), index=inputs()["index"])
    found = taylor_importance(program, random_calls(program, 1))
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["inner.weight"].any()


@pytest.fixture(scope="module")
def denoiser(moving_digits):
    return capture(moving_digits, dtype=torch.float32)


def test_a_loop_is_asked_for_its_computed_variant(denoiser):
    plain = taylor_importance(denoiser, random_calls(denoiser, 1))
    cached, _ = run_pass(denoiser, Step("cache-features", CacheFeatures(cut="up_blocks.1", every=2)))
    assert list(random_calls(cached, 1)) == [LOOP]
    found = taylor_importance(cached, random_calls(cached, 1))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-3, atol=1e-6 * float(plain[name].max()))


def test_calls_of_a_pipeline(denoiser, moving_digits):
    [(_, calls)] = sampled_calls(denoiser, build_pipeline(moving_digits, {}), Asked(steps=5), 3).items()
    times = [float(each["timestep"].flatten()[0]) for each in calls]
    assert len(times) == 3
    assert times == sorted(times, reverse=True)
    assert set(calls[0]) == set(denoiser.entries["full"].signature.inputs)


def test_needs_values(capture_module):
    program, _ = capture_module(Net, **inputs())
    weight = program.weights["inner.weight"]
    bare = program.with_weights({"inner.weight": Absent("inner.weight", weight.shape, weight.dtype)})
    with pytest.raises(MissingValuesError):
        taylor_importance(bare, random_calls(bare, 1))
