"""Adapter files that are not what they should be: each error names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from optpass.adapters.keys import ModuleKey
from optpass.adapters.reading import read_adapter
from optpass.errors import UserError, WeightError
from optpass.ir.safetensors_io import Stored

A, B = "base_model.model.block.to_q.lora_A.weight", "base_model.model.block.to_q.lora_B.weight"
PAIR = {A: torch.ones(4, 8), B: torch.ones(12, 4)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["to_q"]}


def folder(path: Path, tensors: Any = None, **config: Any) -> Path:
    """A folder as peft writes it."""
    save_file(PAIR if tensors is None else tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return path


def test_a_folder_of_peft(tmp_path):
    adapter = read_adapter(folder(tmp_path))
    [(module, adaptation)] = adapter.modules.items()
    assert module == ModuleKey("", "block.to_q")
    assert (adaptation.kind, adaptation.rank, adaptation.alpha, adaptation.scale) == ("lora", 4, 6.0, 1.5)
    assert adaptation.keys == {"down": A, "up": B}
    assert all(isinstance(factor, Stored) for factor in adaptation.factors.values())
    assert adaptation.delta((12, 8)).shape == (12, 8)
    assert not adapter.unsupported
    assert not adapter.notes


def test_pickled_weights(tmp_path):
    folder(tmp_path)
    torch.save(PAIR, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    [adaptation] = read_adapter(tmp_path).modules.values()
    assert adaptation.scale == 1.5


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_adapter(tmp_path / "rain")
    with pytest.raises(UserError, match=r"none of adapter_model\.safetensors, .* is in it"):
        read_adapter(tmp_path)


def test_a_damaged_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(WeightError, match="safetensors"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VERA"}, "an adapter of the kind VERA; merged are LORA, LOHA, LOKR"),
        ({"peft_type": "IA3"}, "an adapter of the kind IA3"),
        ({"r": 8}, r"to_q\.lora_A\.weight' has rank 4, and the adapter's configuration says 8"),
        ({"rank_pattern": {"to_q": 2}}, "has rank 4, and the adapter's configuration says 2"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern of the adapter's configuration: '\\(' is no pattern"),
        ({"lora_alpha": None}, "no alpha for block.to_q"),
        ({"lora_alpha": "16"}, "lora_alpha of the adapter's configuration is '16' where a number belongs"),
        (
            {"use_dora": True},
            r"to_q\.lora_A\.weight' is half of a pair: use_dora, and there is no lora_magnitude_vector",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights too"),
        ({"layer_replication": [[0, 4]]}, "has layer_replication, which is more than W"),
    ],
)
def test_configurations(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        read_adapter(folder(tmp_path, **config))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: PAIR[A]}, r"to_q\.lora_A\.weight' is half of a pair: its module has no up"),
        ({B: PAIR[B]}, r"to_q\.lora_B\.weight' is half of a pair: its module has no down"),
        (
            {A: PAIR[A], B: torch.ones(12, 3)},
            r"lora_B\.weight' is \[12, 3\] and .*lora_A\.weight' \[4, 8\]: they disagree",
        ),
        ({"x.hada_w1_a": PAIR[B]}, r"x\.hada_w1_a' is half of a pair: its module has no w1_b"),
        ({"x.lokr_w1": PAIR[B], "x.lokr_w2_a": PAIR[B]}, "half of a pair: its module has no w2_b"),
        ({"x.lokr_w1": PAIR[B]}, "half of a pair: its module has no w2 or w2_a"),
        ({"x.alpha": torch.ones(())}, "'x.alpha' are without factors"),
        ({**PAIR, "base_model.model.block.to_q.lokr_w1": PAIR[A]}, "are of several kinds"),
        ({**PAIR, "unet.block.to_q.lora.down.weight": PAIR[A]}, "both are the down of unet.block.to_q"),
        ({"x.ia3_l": PAIR[A]}, "holds no LoRA, LoHa or LoKr: IA³"),
        ({}, "holds no LoRA, LoHa or LoKr: it is empty"),
        ({**PAIR, "unet.block.to_q.alpha": torch.ones(2)}, r"alpha' is \[2\] where a single number belongs"),
        ({**PAIR, "unet.block.to_q.alpha": torch.tensor(float("nan"))}, "alpha' is nan; the adapter is damaged"),
    ],
)
def test_tensors(tmp_path, tensors, message):
    # Without peft's prefix, which asks for a configuration.
    plain = {key.replace("base_model.model.block", "unet.block"): tensor.clone() for key, tensor in tensors.items()}
    save_file(plain, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "lora.safetensors")


def test_a_configuration_is_of_peft_s_file_only(tmp_path):
    folder(tmp_path)
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in PAIR.items()}
    save_file(plain, tmp_path / "other.safetensors")
    adapter = read_adapter(tmp_path / "other.safetensors")
    assert [adaptation.scale for adaptation in adapter.modules.values()] == [1.0]
    assert adapter.notes == ("no alpha in the file: taken as the rank, so that the scale is 1",)


def test_peft_s_file_without_its_configuration(tmp_path):
    (folder(tmp_path) / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"lora_A\.weight' is of peft, whose alpha stands in adapter_config\.json"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite(tmp_path, value):
    broken = torch.ones(12, 4)
    broken[3, 2] = value
    adapter = read_adapter(folder(tmp_path, {A: PAIR[A], B: broken}))
    with pytest.raises(WeightError, match=r"to_q\.lora_B\.weight' holds NaN or Inf"):
        adapter.check_finite()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_A.weight": torch.ones(0, 8), "q.lora_B.weight": torch.ones(12, 0)}, r"'q\.lora_.*\[.*0.*matrix"),
        ({"q.lora_A.weight": torch.ones(2, 8).char(), "q.lora_B.weight": torch.ones(12, 2)}, r"lora_A.* is i8"),
        ({"q.lokr_w1": torch.ones(()), "q.lokr_w2": torch.ones(4, 4)}, r"'q\.lokr_w1' is \[\] where a matrix"),
        ({"q.lokr_w1": torch.ones(4, 4), "q.lokr_w2": torch.ones(4)}, r"'q\.lokr_w2' is \[4\] where a matrix"),
        ({f"q.hada_w{n}_{x}": torch.ones(2) for n in "12" for x in "ab"}, r"'q\.hada_w1_a' is \[2\] where a matrix"),
    ],
)
def test_factors_that_are_no_matrices(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "lora.safetensors")


def test_factors_in_eight_bits(tmp_path):
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in PAIR.items()}
    [adaptation] = read_adapter(folder(tmp_path, tensors)).modules.values()
    read_adapter(tmp_path).check_finite()
    assert (adaptation.delta((12, 8)).evaluate() == 6).all()


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        ({"down": (2, 8, 1, 1), "up": (12, 2, 1, 1), "mid": (2, 2, 9, 1)}, (12, 8, 3, 3)),
        ({"w1_a": (12, 2), "w1_b": (2, 8), "w2_a": (12, 2), "w2_b": (2, 7)}, (12, 8)),
        ({"w1_a": (2, 12), "w1_b": (2, 8), "w2_a": (2, 12), "w2_b": (2, 8), "t1": (2, 2, 3), "t2": (2, 2)}, (12, 8, 3)),
    ],
)
def test_factors_that_make_another_shape(tmp_path, tensors, shape):
    """As many values as the weight has, or one factor of its shape, are not enough."""
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
    values = {f"q.{names.get(name, f'hada_{name}')}": torch.ones(size) for name, size in tensors.items()}
    save_file(values, tmp_path / "lora.safetensors")
    [adaptation] = read_adapter(tmp_path / "lora.safetensors").modules.values()
    with pytest.raises(UserError, match="changes a weight of"):
        adaptation.check_fits(shape)
