"""The committed checkpoint: small, half precision, deep enough, and it reads digits."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn")

from safetensors.torch import load_file

from optpass.capture.sources import capture
from optpass.evaluate.difference import program_runner

FOLDER = Path(__file__).parent / "digits-vit"


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """The training script, as a module."""
    spec = importlib.util.spec_from_file_location("digits_vit_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_weights_are_small_half_precision_and_finite() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 2_500_000
    for name, tensor in load_file(path).items():
        assert tensor.dtype == torch.float16, name
        assert torch.isfinite(tensor).all(), name


def test_it_is_as_deep_as_it_says_and_reads_held_out_digits(train: ModuleType) -> None:
    """The captured Program and not the module, which transformers' own tests are about."""
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == 12
    assert (config["image_size"] // config["patch_size"]) ** 2 == 64
    scans, labels = train.digits("held-out")
    program = capture(FOLDER, inputs={"pixel_values": (len(scans), 1, 32, 32)}, dtype=torch.float32)
    logits = program_runner(program, "full")({"pixel_values": train.render(scans)})["logits"]
    found = (logits.argmax(-1) == labels).float().mean().item()
    recorded = json.loads((FOLDER / "evaluation.json").read_text("utf-8"))
    assert recorded["held_out_accuracy"] >= 0.97
    assert found == pytest.approx(recorded["held_out_accuracy"], abs=0.003)


def test_a_training_step_is_drawn_from_the_seed_and_its_number_alone(train: ModuleType) -> None:
    data, parameters = train.digits("train"), train.Hyperparameters(batch=4)
    images, targets = train.drawn_batch(data, parameters, 7)
    again, _ = train.drawn_batch(data, parameters, 7)
    other, _ = train.drawn_batch(data, parameters, 8)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert images.shape == (4, 1, 32, 32)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
