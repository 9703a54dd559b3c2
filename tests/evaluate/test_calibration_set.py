"""Calibration sets: where calls come from, how they are thinned, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from denoisers import sampled
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.calibration_set import CalibrationSet, _Thinned, given_set, random_set
from optpass.passes.cache_blocks import CacheBlocks
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.testing import capture_module


class Two(nn.Module):
    def forward(self, x, scale):
        return x * scale[:, None]


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 1)

    def forward(self, pixels):
        return self.convolution(pixels)


@pytest.fixture(scope="module")
def two():
    return capture_module(Two, x=torch.zeros(1, 4), scale=torch.zeros(1))[0]


@pytest.fixture(scope="module")
def picture():
    return capture_module(Picture, pixels=torch.zeros(1, 3, 6, 8))[0]


@pytest.fixture
def dataset(monkeypatch):
    """A module ``given`` with what is put into it."""
    module = ModuleType("given")
    monkeypatch.setitem(sys.modules, "given", module)
    return module


def item(value=1.0):
    return {"x": torch.full((4,), value), "scale": torch.tensor([value])}


@pytest.mark.parametrize("seen", [1, 3, 7, 8, 64, 1000])
def test_of_a_stream_of_any_length_calls_are_evenly_spaced(seen):
    thinned = _Thinned(4)
    for index in range(seen):
        thinned.add({"x": torch.tensor(float(index))})
    assert len(thinned.kept) < 8
    found = [call["x"].item() for call in thinned.calls()]
    assert len(found) == min(4, seen)
    assert found[0] == 0
    assert found[-1] >= 0.75 * (seen - 1)
    gaps = np.diff(found)
    assert not len(gaps) or gaps.max() <= 2 * gaps.min()


def test_what_is_kept_is_a_copy():
    thinned, value = _Thinned(2), torch.zeros(2)
    thinned.add({"x": value})
    value.fill_(9.0)
    assert thinned.calls()[0]["x"].tolist() == [0, 0]


def test_random_calls_are_seeded_and_hashed(two):
    found, again, other = (random_set(two, count=3, seed=seed) for seed in (5, 5, 6))
    assert len(found.entries["full"]) == 3
    assert found.digest == again.digest
    assert found.digest != other.digest
    assert not torch.equal(found.entries["full"][0]["x"], found.entries["full"][1]["x"])


def test_the_hash_is_of_names_order_and_values():
    one, two = {"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0])}
    hashes = {
        CalibrationSet(entries, "").digest
        for entries in ({"a": [one, two]}, {"a": [two, one]}, {"b": [one, two]}, {"a": [one], "b": [two]})
    }
    assert len(hashes) == 4
    assert CalibrationSet({"a": [one]}, "here").digest == CalibrationSet({"a": [dict(one)]}, "there").digest


@pytest.mark.parametrize(("calls", "asked", "held"), [(10, 2, [2, 7]), (5, 1, [2]), (3, 5, [0, 2]), (2, 1, [0])])
def test_held_out_calls_are_in_one_part_alone(calls, asked, held):
    numbered = [{"x": torch.tensor(index)} for index in range(calls)]
    kept, apart = CalibrationSet({"full": numbered}, "s").split(asked)
    assert [int(call["x"]) for call in apart.entries["full"]] == held
    assert [int(call["x"]) for call in kept.entries["full"]] == [index for index in range(calls) if index not in held]


def test_an_only_call_is_in_both_parts():
    kept, apart = CalibrationSet({"full": [{"x": torch.tensor(1)}]}, "s").split(2)
    assert len(kept.entries["full"]) == len(apart.entries["full"]) == 1


def test_every_entry_of_a_loop_is_called(tmp_path):
    program, _ = sampled("DiT-XL/2", tmp_path)
    cached, _ = run_pass(program, Step("cache-blocks", CacheBlocks(head=1, every=2)))
    found = random_set(cached, count=4, seed=0)
    assert set(found.entries) == set(cached.entries)
    for name, graph in cached.entries.items():
        assert set(found.entries[name][0]) == set(graph.signature.inputs)


def test_a_folder_of_tensors_in_every_format(two, tmp_path):
    save_file(item(1.0), tmp_path / "a.safetensors")
    torch.save(item(2.0), tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", **{name: value.numpy() for name, value in item(3.0).items()})
    (tmp_path / "notes.txt").write_text("no tensor")
    calls = given_set(two, str(tmp_path), count=9).entries["full"]
    assert [call["x"].tolist() for call in calls] == [[[value] * 4] for value in (1.0, 2.0, 3.0)]
    assert len(given_set(two, str(tmp_path), count=2).entries["full"]) == 2
    assert len(given_set(two, str(tmp_path / "a.safetensors"), count=2).entries["full"]) == 1


def test_images_become_what_the_model_takes(picture, tmp_path):
    Image.new("L", (20, 10), 255).save(tmp_path / "white.png")
    np.save(tmp_path / "zero.npy", np.zeros((3, 6, 8), np.float32))
    white, zero = given_set(picture, str(tmp_path), count=4).entries["full"]
    assert white["pixels"].shape == (1, 3, 6, 8)
    assert white["pixels"].unique().tolist() == [1.0]
    assert zero["pixels"].unique().tolist() == [0.0]


@pytest.mark.parametrize("form", ["sequence", "function", "generator", "tuples"])
def test_datasets_by_name(two, dataset, form):
    items = [item(float(index)) for index in range(5)]
    dataset.data = {
        "sequence": items,
        "function": lambda: items,
        "generator": lambda: iter(items),
        "tuples": [(each["x"], each["scale"]) for each in items],
    }[form]
    calls = given_set(two, "given:data", count=3).entries["full"]
    assert [call["scale"].item() for call in calls] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "given:data has no item"),
        ([{"x": torch.zeros(4)}], "item 0 has no 'scale'"),
        ([{"y": torch.zeros(4), "scales": torch.zeros(1)}], "item 0 has no 'x'"),
        ([torch.zeros(4)], "has no 'scale'"),
        ([item(), {**item(), "x": torch.zeros(5)}], r"item 1 has x of shape \[1, 5\], and the model takes \[1, 4\]"),
        ([{**item(), "x": torch.zeros(2, 4)}], r"x of shape \[2, 4\]"),
        ([item(), item(torch.nan)], "item 1 has x with NaN or Inf"),
        ([{**item(), "x": "text"}], "x of type str, and not a tensor"),
        (["text"], "is a str, and not inputs by name"),
        (3, "is a int, and neither a dataset nor iterable"),
    ],
)
def test_items_that_do_not_fit_are_refused(two, dataset, given, message):
    dataset.data = given
    with pytest.raises(UserError, match=message):
        given_set(two, "given:data", count=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "'nowhere' is no folder, and no dataset written as"),
        ("no_such_module:data", "cannot import 'no_such_module'"),
        ("given:dat", "given has no 'dat'; did you mean 'data'"),
    ],
)
def test_data_that_is_not_there_is_refused(two, dataset, data, message):
    dataset.data = []
    with pytest.raises(UserError, match=message):
        given_set(two, data, count=4)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.npz", "a.npy"])
def test_damaged_files_are_refused(two, tmp_path, name):
    (tmp_path / name).write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        given_set(two, str(tmp_path), count=4)


def test_folders_without_data_are_refused(two, picture, tmp_path):
    with pytest.raises(UserError, match=r"has no file of \.pt"):
        given_set(two, str(tmp_path), count=4)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="images serve models of one image input"):
        given_set(two, str(tmp_path), count=4)
    with pytest.raises(UserError, match=r"cannot read .*a\.png"):
        given_set(picture, str(tmp_path), count=4)


def test_open_sizes_take_any_and_fixed_ones_their_own(capture_shared, dataset):
    program = capture_shared(Picture, {"pixels": (1, 3, "high", 8)}, {"high": Span(2, 16)})
    dataset.data = [torch.zeros(3, 4, 8), torch.zeros(3, 10, 8)]
    calls = given_set(program, "given:data", count=4).entries["full"]
    assert [call["pixels"].shape[2] for call in calls] == [4, 10]
    dataset.data = [torch.zeros(3, 4, 9)]
    with pytest.raises(UserError, match=r"shape \[1, 3, 4, 9\], and the model takes \[1, 3, high, 8\]"):
        given_set(program, "given:data", count=4)


def test_a_model_of_several_calls_is_no_datasets(two, dataset):
    dataset.data = [item()]
    several = replace(two, entries={"encode": two.entries["full"], "decode": two.entries["full"]})
    with pytest.raises(UserError, match="several calls"):
        given_set(several, "given:data", count=4)
