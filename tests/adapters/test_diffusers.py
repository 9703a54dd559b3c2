"""Adapters in the layouts that diffusers writes and reads, merged here and fused by diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from unets import PROJECTIONS, factors, save, small_text_encoder, small_unet

from optpass.capture.sources import capture

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "time_emb_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(small_unet(), tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def program(folder):
    return capture(folder)


def fused(adapter, **options):
    """The weights of the small UNet with an adapter, as diffusers fuses them."""
    unet = small_unet()
    unet.load_lora_adapter(adapter, prefix="unet", **options)
    unet.fuse_lora()
    unet.unload_lora()
    return unet.state_dict()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"to_k": 3}}, {"use_dora": True}])
def test_saved_by_diffusers(program, merge, worst_difference, tmp_path, options):
    unet = small_unet()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(TARGETS), **options)
    unet.add_adapter(config)
    for name, tensor in unet.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    layers = get_peft_model_state_dict(unet)
    metadata = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    after, record = merge(program, tmp_path)
    assert len(record.sites) == len([name for name in layers if name.endswith("lora_A.weight")])
    assert not record.declined
    assert worst_difference(after, fused(tmp_path, weight_name="pytorch_lora_weights.safetensors")) <= 1e-6


LAYOUTS = {
    "peft": ("unet.{path}.lora_A.weight", "unet.{path}.lora_B.weight"),
    "modules": ("unet.{path}.lora.down.weight", "unet.{path}.lora.up.weight"),
    "processors": (
        "unet.{attention}.processor.{name}_lora.down.weight",
        "unet.{attention}.processor.{name}_lora.up.weight",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_without_a_configuration(program, merge, worst_difference, tmp_path, layout):
    tensors = {}
    for path, pair in factors(small_unet(), PROJECTIONS).items():
        attention, _, name = path.removesuffix(".0").rpartition(".")
        for pattern, tensor in zip(LAYOUTS[layout], pair, strict=True):
            tensors[pattern.format(path=path, attention=attention, name=name)] = tensor
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    after, record = merge(program, tmp_path / "pytorch_lora_weights.safetensors")
    assert len(record.sites) == len(tensors) // 2
    [note] = record.declined
    assert note.reason == "no alpha in the file: taken as the rank, so that the scale is 1"
    # What load_lora_weights does to the names before it hands them to the model.
    plain, _ = StableDiffusionPipeline.lora_state_dict(dict(tensors))
    assert worst_difference(after, fused(plain)) <= 1e-6


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_linear_layer.down", "lora_linear_layer.up")])
def test_a_text_encoder(merge, worst_difference, tmp_path, names):
    """Names with ``text_model``, which transformers took out of CLIP's text model."""
    encoder = small_text_encoder()
    program = capture(save(encoder, tmp_path / "encoder"))
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    tensors = {
        f"text_encoder.text_model.{path}.{name}.weight": tensor
        for path, pair in factors(encoder, targets).items()
        for name, tensor in zip(names, pair, strict=True)
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    after, record = merge(program, tmp_path / "lora.safetensors")
    assert len(record.sites) == len(tensors) // 2 == 10
    StableDiffusionPipeline.load_lora_into_text_encoder(tensors, None, encoder, prefix="text_encoder")
    from diffusers.loaders.lora_base import fuse_text_encoder_lora

    fuse_text_encoder_lora(encoder)
    expected = {name.replace(".base_layer", ""): value for name, value in encoder.state_dict().items()}
    assert worst_difference(after, expected) <= 1e-6
