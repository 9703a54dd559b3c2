"""Damaged and mixed-up weights through the command: one message that names the place, exit 2, and nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import optpass as library

CODE = """
import torch
from torch import nn

class Gate(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))

def gated():
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), Gate()))

def example_inputs():
    return {"input": torch.zeros(2, 4)}
"""
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


@pytest.fixture
def eager(randomised):
    return randomised(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3))).eval()


@pytest.fixture
def folder(tmp_path, eager):
    """A factory, and its weights as two shards and an index: the last layer is in the second."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "net.py").write_text(CODE)
    state = eager.state_dict()
    table = {name: SECOND if name.startswith("2.") else FIRST for name in state}
    for shard in (FIRST, SECOND):
        save_file({name: tensor for name, tensor in state.items() if table[name] == shard}, made / shard)
    (made / INDEX).write_text(json.dumps({"weight_map": table}))
    return made


@pytest.fixture
def apply(optpass, folder, tmp_path):
    def run(factory="net", weights=INDEX):
        source, out = f"{folder / 'net.py'}:{factory}", tmp_path / "bundle"
        return optpass("apply", "export", source, "-o", out, "--weights", folder / weights, "--no-baseline")

    return run


def edit(folder, shard, change):
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def pickled_and_truncated(folder):
    torch.save(load_file(folder / SECOND), folder / "model-2-of-2.bin")
    truncate(folder / "model-2-of-2.bin")
    edit_index(folder, lambda table: table.update({"2.weight": "model-2-of-2.bin", "2.bias": "model-2-of-2.bin"}))


def unlisted_twice(folder):
    for shard in (FIRST, SECOND):
        edit(folder, shard, lambda tensors: tensors.update({"3.bias": torch.ones(3)}))


DAMAGES = {
    "a missing shard": (
        lambda folder: (folder / SECOND).unlink(),
        f"{INDEX} names the shard '{SECOND}', which is missing from",
    ),
    "a truncated shard": (
        lambda folder: truncate(folder / SECOND),
        f"{SECOND}: truncated: the data of '2.weight' ends",
    ),
    "a truncated pickled shard": (pickled_and_truncated, "model-2-of-2.bin is truncated: the end of the archive"),
    "an absent tensor in the index": (
        lambda folder: edit_index(folder, lambda table: table.update({"3.bias": SECOND})),
        f"{SECOND} lacks the tensor '3.bias', which {INDEX} promises",
    ),
    "an unlisted tensor in two shards": (
        unlisted_twice,
        f"{FIRST} and {SECOND} both hold '3.bias', and {INDEX} does not say which one counts",
    ),
    "a tensor that is nowhere": (
        lambda folder: (
            edit(folder, SECOND, lambda tensors: tensors.pop("2.bias")),
            edit_index(folder, lambda table: table.pop("2.bias")),
        ),
        "1 weights are missing from the checkpoint: 2.bias",
    ),
    "integers for floats": (
        lambda folder: edit(folder, FIRST, lambda t: t.update({"0.weight": torch.zeros(6, 4, dtype=torch.int8)})),
        "1 weights do not fit the model: 0.weight: the model has f32, the checkpoint i8",
    ),
    "another shape": (
        lambda folder: edit(folder, SECOND, lambda tensors: tensors.update({"2.weight": torch.zeros(3, 7)})),
        "1 weights do not fit the model: 2.weight: the model has [3, 6], the checkpoint [3, 7]",
    ),
    "a damaged index": (lambda folder: (folder / INDEX).write_text('{"weight_map": '), "is damaged: not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_message_that_names_the_place(apply, folder, tmp_path, damage):
    make, message = DAMAGES[damage]
    make(folder)
    outcome = apply()
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert outcome.err.count("error:") == 1
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_that_refuses_export_is_named_by_its_part_and_leaves_nothing(apply, tmp_path):
    outcome = apply("gated")
    assert outcome.code == 2
    shown = " ".join(outcome.err.split())
    assert "torch.export cannot capture Sequential: at 1.1: Could not guard on data-dependent expression" in shown
    assert "def forward" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def assert_same(tmp_path, eager):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(library.load(tmp_path / "bundle")(x), eager(x), atol=1e-5, rtol=1e-5)


def test_shards_of_mixed_dtypes_and_formats_make_an_engine(apply, folder, tmp_path, eager):
    halves = {name: tensor.half() for name, tensor in load_file(folder / FIRST).items() if name.startswith("0.")}
    edit(folder, FIRST, lambda tensors: tensors.update(halves))
    torch.save(load_file(folder / SECOND), folder / "model-2-of-2.bin")
    (folder / SECOND).unlink()
    edit_index(folder, lambda table: table.update({"2.weight": "model-2-of-2.bin", "2.bias": "model-2-of-2.bin"}))
    assert apply().code == 0
    eager.load_state_dict({**eager.state_dict(), **halves})
    assert_same(tmp_path, eager)


def test_a_tensor_that_the_index_forgot_is_found_in_its_shard(apply, folder, tmp_path, eager):
    edit_index(folder, lambda table: table.pop("2.bias"))
    assert apply().code == 0
    assert_same(tmp_path, eager)


def test_of_two_shards_that_hold_a_tensor_the_index_names_the_one(apply, folder, tmp_path, eager):
    edit(folder, SECOND, lambda tensors: tensors.update({"0.weight": torch.zeros(6, 4)}))
    assert apply().code == 0
    assert_same(tmp_path, eager)
