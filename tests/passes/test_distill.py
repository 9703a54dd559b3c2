"""Healing: what trains, towards what, on what; against loops written by hand; interrupted and whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from loops import denoiser
from torch import Tensor, nn

from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference, program_runner
from optpass.evaluate.trials import random_inputs
from optpass.ir.loop import single_step
from optpass.ir.program import InputRange, Program
from optpass.ir.weights import Constant, Scale
from optpass.passes.cache_features import CacheFeatures
from optpass.passes.cast import CastFloats
from optpass.passes.distill import Distill
from optpass.pipeline.contract import retrain
from optpass.pipeline.manager import run_passes
from optpass.pipeline.passes import Pass
from optpass.pipeline.recipe import Step, check_legality, make_recipe
from optpass.testing import capture_module
from optpass.training.courses import GivenCourses


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Perturb(Pass):
    """W → W + noise, for a layer that is then as good as new."""

    weight: str = "last.weight"
    scale: float = 0.5

    contract = retrain()

    def run(self, program, context):
        if not self.scale:
            context.rewrote(self.weight)
            return program.with_untrained({self.weight: Scale(program.weights[self.weight], 1.0)})
        value = program.weights[self.weight].evaluate()
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
        context.rewrote(self.weight)
        return program.with_untrained({self.weight: Constant(value + self.scale * noise)})


@pytest.fixture(name="net", scope="module")
def _net():
    return capture_module(Net, x=torch.zeros(16, 6))


def healed(program: Program, work: Path, *before: Pass, **options) -> tuple[Program, Program, object]:
    """The Programs before and after the pass, and its record."""
    steps = [Step(f"pass-{index}", item) for index, item in enumerate(before)]
    record = Distill(**{"work": work, "warmup": 0, **options})
    middle, _ = run_passes(program, steps)
    after, records = run_passes(program, [*steps, Step("distill", record)])
    return middle, after, records[-1]


def test_a_perturbed_layer_recovers(net, tmp_path):
    program, _ = net
    before, after, record = healed(program, tmp_path, Perturb(), updates=150, learning_rate=0.05)
    found = record.facts["training"]
    assert found["last"] * 100 < found["first"]
    assert program_difference(program, after).snr > program_difference(program, before).snr + 20
    assert record.modified
    assert record.sites == ("last.weight",)
    assert not after.untrained
    assert all(after.weights[name] is before.weights[name] for name in before.weights if name != "last.weight")


def plain_loop(program: Program, perturbed: Tensor, updates: int, rate: float) -> Tensor:
    """The same training by hand, on the module: inputs are those of the seed, one call an update."""
    module, teacher = Net().eval(), Net().eval()
    values = {name: program.weights[name].evaluate() for name in program.weights}
    for each in (module, teacher):
        each.load_state_dict(values, strict=False)
    module.last.weight = nn.Parameter(perturbed.clone())
    optimiser = torch.optim.AdamW([module.last.weight], lr=rate, weight_decay=0.01)
    for update in range(updates):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(update))
        loss = (module(x) - teacher(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([module.last.weight], 0.1)
        optimiser.step()
    return module.last.weight.detach()


def test_it_is_the_loop_that_one_would_write(net, tmp_path):
    program, _ = net
    options = {"schedule": "constant", "clip": 0.1, "weight_decay": 0.01}
    before, after, _ = healed(program, tmp_path, Perturb(), updates=30, learning_rate=0.01, **options)
    expected = plain_loop(program, before.weights["last.weight"].evaluate(), 30, 0.01)
    assert (after.weights["last.weight"].evaluate() - expected).abs().max() <= 1e-5


def test_nothing_changed_has_no_loss_and_moves_nothing(net, tmp_path):
    program, _ = net
    before, after, record = healed(program, tmp_path, Perturb(scale=0.0), updates=5)
    assert record.facts["training"]["losses"]["loss"] == [0.0] * 5
    assert not record.modified
    assert [item.path for item in record.declined] == ["last.weight"]
    assert str(after.weights["last.weight"]) == str(before.weights["last.weight"])


def test_all_leaves_statistics_alone(net, tmp_path):
    _, after, record = healed(net[0], tmp_path, Perturb(), train="all", updates=3)
    assert {item.path for item in record.declined} == {"norm.running_mean", "norm.running_var"}
    assert set(record.sites) == set(net[0].weights) - {"norm.running_mean", "norm.running_var"}
    assert torch.equal(after.weights["norm.running_var"].evaluate(), net[0].weights["norm.running_var"].evaluate())


def test_scopes_and_features(net, tmp_path):
    options = {"train": "scopes", "scopes": "first", "features": "norm", "output_weight": 0.0, "learning_rate": 0.05}
    _, after, record = healed(net[0], tmp_path, Perturb(weight="first.weight"), updates=150, **options)
    losses = record.facts["training"]["losses"]
    assert set(losses) == {"loss", "features"}
    assert losses["features"][-1] * 10 < losses["features"][0]
    assert set(record.sites) == {"first.weight", "first.bias"}
    assert after.untrained == set()


def test_the_teacher_may_be_what_went_into_a_pass(net, tmp_path):
    second = Perturb(weight="first.weight", scale=0.2)
    options = {"updates": 1, "teacher": "pass-1", "train": "all", "output_weight": 1.0}
    _, _, record = healed(net[0], tmp_path, Perturb(), second, **options)
    middle, _, _ = healed(net[0], tmp_path, Perturb(), updates=1)
    before, _, _ = healed(net[0], tmp_path, Perturb(), second, updates=1)
    x = {"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(0))}
    (one,), (other,) = (program_runner(each, "full")(x).values() for each in (middle, before))
    assert record.facts["training"]["losses"]["loss"][0] == pytest.approx(
        float((one - other).square().mean()), rel=1e-5
    )


class Level(nn.Module):
    """A denoiser of images with an inner level that is worth skipping, and an embedding of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.enter, self.inner, self.leave = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 8), (8, 8), (8, 3)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = torch.sin(self.time(timestep.reshape(1, 1) / 1000).expand(len(sample), 8))
        outer = self.enter(sample)
        return self.leave(torch.tanh(self.inner(torch.relu(outer) + time[..., None, None])) + outer)


def test_an_adaptor_learns_what_reusing_steps_miss(tmp_path):
    program, _ = capture_module(Level, sample=torch.zeros(2, 3, 8, 8), timestep=torch.tensor(1.0))
    loop = single_step("full", program.entries["full"].signature)
    program = replace(program, loop=loop, ranges={"timestep": InputRange(0, 1000, "uniform")})
    cache = CacheFeatures(cut="inner", every=3, adaptor="resnet", width=32)
    before, after, record = healed(program, tmp_path, cache, updates=24, calls=6, learning_rate=4e-3)
    assert {name.partition(".")[0] for name in record.sites} == {"adaptor"}
    assert record.facts["training"]["source"] == "random inputs"
    # Of a walk that was not trained on.
    found = [program_difference(program, each, seed=99).snr for each in (before, after)]
    assert found[1] > found[0] + 3
    # Steps that compute give what they gave.
    x = random_inputs(before.entries["full"].inputs_at(), program.ranges, 1)
    one, other = (program_runner(each, "full")(x) for each in (before, after))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_data_of_single_calls_is_not_for_steps_that_hand_something_on(tmp_path):
    program, _ = denoiser()
    with pytest.raises(UserError, match="train it without 'data'"):
        healed(program, tmp_path, CacheFeatures(cut="inner"), train="all", data="somewhere")


SETS = '''
import torch
from torch.utils.data import Dataset

class Rows(Dataset):
    """Noisy at every reading: what is drawn must not depend on what was drawn before."""
    def __len__(self):
        return 40
    def __getitem__(self, index):
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return x + 0.1 * torch.randn(6), torch.tensor(index % 3)

def bad():
    return [(torch.zeros(7), torch.tensor(0))] * 4

def once():
    return (row for row in range(3))

def of_task(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs["output"], batch["target"])

def flawed(outputs, batch):
    return outputs["output"]

def infinite(outputs, batch):
    return outputs["output"].sum() * float("nan")
'''


@pytest.fixture(name="sets")
def _sets(tmp_path):
    path = tmp_path / "sets.py"
    path.write_text(SETS, encoding="utf-8")
    return path


def test_a_dataset_with_labels_and_a_task(net, tmp_path, sets):
    options = {"data": f"{sets}:Rows", "task": f"{sets}:of_task", "output_weight": 0.0, "average": 0.9}
    _, _, record = healed(net[0], tmp_path, Perturb(), updates=60, learning_rate=0.05, train="all", **options)
    losses = record.facts["training"]["losses"]["task"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    outcome = record.record.outcome
    assert outcome["data"] == record.facts["training"]["sha256"]
    assert (outcome["seed"], outcome["updates"]) == (0, 60)
    with pytest.raises(UserError, match="is not the data that was settled"):
        healed(net[0], tmp_path, Perturb(), data=f"{sets}:Rows", outcome={"data": "0" * 64})


def test_logits_are_learnt_by_their_divergence(net, tmp_path):
    options = {"loss": "kl", "temperature": 2.0, "updates": 80, "learning_rate": 0.05}
    _, _, record = healed(net[0], tmp_path, Perturb(), **options)
    losses = record.facts["training"]["losses"]["loss"]
    assert losses[-1] * 20 < losses[0]


def test_half_precision_trains_in_float32_and_is_rounded_once(net, tmp_path):
    cast = CastFloats(dtype="float16")
    before, after, record = healed(net[0], tmp_path, Perturb(), cast, updates=60, learning_rate=0.05)
    assert after.weights["last.weight"].dtype == torch.float16
    assert record.facts["training"]["last"] * 20 < record.facts["training"]["first"]
    assert not after.untrained
    assert program_difference(net[0], after).snr > program_difference(net[0], before).snr + 10


def test_mixed_precision_leaves_the_process_as_it_was(net, tmp_path):
    torch.manual_seed(3)
    random_state, strict = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    _, _, record = healed(net[0], tmp_path, Perturb(), precision="bf16", updates=40, learning_rate=0.05)
    assert record.facts["training"]["last"] * 4 < record.facts["training"]["first"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.are_deterministic_algorithms_enabled() is strict
    assert not AcceleratorState._shared_state


def test_open_sizes(capture_shared, tmp_path, sets):
    program = capture_shared(Net, {"x": ("batch", 6)}, {"batch": Span(2, 64)})
    options = {"features": "norm", "feature_weight": 0.1, "updates": 40, "learning_rate": 0.05}
    _, after, record = healed(program, tmp_path, Perturb(), data=f"{sets}:Rows", **options)
    assert record.facts["training"]["last"] * 3 < record.facts["training"]["first"]
    assert after.entries["full"].inputs[0].is_open


def test_a_folder_of_tensors(net, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        torch.save({"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(index))}, folder / f"{index}.pt")
    _, _, record = healed(net[0], tmp_path, Perturb(), data=str(folder), updates=30, learning_rate=0.05)
    assert record.facts["training"]["last"] < record.facts["training"]["first"]


BAD = {
    "shape": ({"data": "bad"}, r"item 0 has x of shape \[1, 7\], and the model takes \[1, 6\]"),
    "order": ({"data": "once"}, "can only be gone through once"),
    "absent": ({"data": "nothing"}, "has no 'nothing'"),
    "scalar": ({"task": "flawed"}, "the loss is a tensor of shape"),
    "nan": ({"task": "infinite"}, r"the loss 'loss' is nan at update 1 \(course 0\): lower the learning rate"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learnt_from_is_refused(net, tmp_path, sets, name):
    given, message = BAD[name]
    options = {key: f"{sets}:{value}" for key, value in given.items()}
    with pytest.raises(UserError, match=message):
        healed(net[0], tmp_path, Perturb(), updates=3, **options)
    assert not list(tmp_path.rglob("*.safetensors"))


REFUSED = {
    "new": ({}, "there is nothing new to train: no pass before it added weights; choose modules"),
    "scope": ({"train": "scopes", "scopes": "frist"}, "'frist' matches no weight"),
    "teacher": ({"train": "all", "teacher": "prune"}, "no pass 'prune' ran before this one"),
    "features": ({"train": "all", "features": "body.*"}, "no module to compare"),
    "statistics": ({"train": "scopes", "scopes": "*.running_mean"}, "it is a statistic of a batch norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(net, tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        healed(net[0], tmp_path, **options)


def test_no_room_for_checkpoints(net, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="set 'work' to a folder on another disk"):
        healed(net[0], tmp_path, Perturb())


def test_it_heals_what_a_recipe_would_be_refused_for():
    passes = [{"cache-features": {"cut": "inner", "adaptor": "resnet"}}]
    with pytest.raises(UserError, match="undefined"):
        check_legality(make_recipe({"passes": passes, "target": "program"}))
    check_legality(make_recipe({"passes": [*passes, "distill"], "target": "program"}))


def test_what_was_trained_is_not_trained_again(net, tmp_path, monkeypatch):
    _, one, first = healed(net[0], tmp_path, Perturb(), updates=3)
    monkeypatch.setattr("optpass.training.trainer.Trainer.run", lambda trainer: pytest.fail("trained again"))
    _, other, second = healed(net[0], tmp_path, Perturb(), updates=3)
    assert first.facts == second.facts
    assert torch.equal(one.weights["last.weight"].evaluate(), other.weights["last.weight"].evaluate())


KILLED = """
import sys
from pathlib import Path
import torch
sys.path[:0] = {paths}
from test_distill import LONG, Net, Perturb, healed
from optpass.testing import capture_module

program, _ = capture_module(Net, x=torch.zeros(16, 6))
healed(program, Path({work!r}), Perturb(), data={data!r}, checkpoint_seconds=0, **LONG)
"""
LONG = {"train": "all", "updates": 200, "average": 0.99, "learning_rate": 0.01}


def test_killed_and_resumed_it_ends_with_the_same_weights(net, tmp_path, sets):
    tests, data = Path(__file__).parents[1], f"{sets}:Rows"
    work = tmp_path / "killed"
    text = KILLED.format(paths=[str(tests), str(tests / "passes")], work=str(work), data=data)
    with subprocess.Popen([sys.executable, "-c", text]) as process:
        deadline = time.monotonic() + 120
        while not list(work.rglob("checkpoint.pt")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    (checkpoint,) = work.rglob("checkpoint.pt")
    reached = torch.load(checkpoint, weights_only=True)["course"]
    assert 0 < reached < LONG["updates"]
    resumed, courses = [], GivenCourses.course
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GivenCourses, "course", lambda own, index, *rest: resumed.append(index) or courses(own, index, *rest)
        )
        _, one, _ = healed(net[0], work, Perturb(), data=data, **LONG)
    assert resumed == list(range(reached, LONG["updates"]))
    _, other, _ = healed(net[0], tmp_path / "whole", Perturb(), data=data, **LONG)
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name].evaluate(), other.weights[name].evaluate()) for name in one.weights)
