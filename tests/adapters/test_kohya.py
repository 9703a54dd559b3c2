"""Adapters as sd-scripts (kohya) and LyCORIS name them, against diffusers' loader and against LyCORIS's formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, pad
from unets import PROJECTIONS, factors, save, small_text_encoder, small_unet

from optpass.adapters.ldm_names import layout_paths, ldm_names
from optpass.capture.sources import capture
from optpass.errors import UserError

TARGETS = (*PROJECTIONS, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(small_unet(), tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def program(folder):
    return capture(folder)


def flat(path: str, prefix: str = "lora_unet_") -> str:
    return prefix + path.replace(".", "_")


def kohya(model: Any, targets: tuple[str, ...], prefix: str = "lora_unet_", alpha: float = 3.0) -> dict[str, Tensor]:
    """An adapter by sd-scripts' names."""
    tensors = {}
    for path, (down, up) in factors(model, targets).items():
        tensors |= module(flat(path, prefix), down, up, alpha)
    return tensors


def module(name: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}


def fused_by_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state, alphas = StableDiffusionPipeline.lora_state_dict(dict(tensors))
    unet = small_unet()
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    unet.fuse_lora()
    unet.unload_lora()
    return unet.state_dict()


def test_underscored_names_and_alphas(program, merge, worst_difference, tmp_path):
    tensors = kohya(small_unet(), TARGETS)
    save_file(tensors, tmp_path / "style.safetensors")
    after, record = merge(program, tmp_path / "style.safetensors")
    assert len(record.sites) == len(tensors) // 3
    assert not record.declined
    assert worst_difference(after, fused_by_diffusers(tensors)) <= 1e-6


def test_names_of_the_original_code(program, merge, worst_difference, tmp_path):
    """What sd-scripts writes for SDXL: ``lora_unet_input_blocks_1_1_…``."""
    unet = small_unet()
    names = {path: name for name, path in ldm_names(path for path, _ in unet.named_modules()).items()}
    tensors = {}
    for path, (down, up) in factors(unet, TARGETS).items():
        tensors |= module(flat(names[path]), down, up, 1.0)
    assert not any("down_blocks" in name for name in tensors)
    save_file(tensors, tmp_path / "style.safetensors")
    after, record = merge(program, tmp_path / "style.safetensors")
    assert len(record.sites) == len(tensors) // 3
    assert worst_difference(after, fused_by_diffusers(kohya(unet, TARGETS, alpha=1.0))) <= 1e-6


def test_a_text_encoder_of_an_adapter_for_both(program, merge, worst_difference, tmp_path):
    encoder = small_text_encoder()
    text = kohya(encoder, ("q_proj", "fc2"), "lora_te_text_model_")
    save_file({**text, **kohya(small_unet(), ("to_q",))}, tmp_path / "both.safetensors")
    found = capture(save(encoder, tmp_path / "encoder"))
    after, record = merge(found, tmp_path / "both.safetensors")
    adapted = ("mlp.fc2", "self_attn.q_proj")
    assert set(record.sites) == {f"encoder.layers.{layer}.{name}" for layer in (0, 1) for name in adapted}
    [left] = record.declined
    assert left.path.endswith("to_q.lora_down.weight")
    assert left.reason == "belongs to component unet, and this model is captured alone (8 modules)"
    expected = {name: value.clone() for name, value in encoder.state_dict().items()}
    for path, (down, up) in factors(encoder, ("q_proj", "fc2")).items():
        expected[f"{path}.weight"] += 1.5 * up @ down
    assert worst_difference(after, expected) <= 1e-6
    _, record = merge(program, tmp_path / "both.safetensors")
    assert all(path.endswith("to_q") for path in record.sites)
    assert "belongs to component text_encoder" in record.declined[0].reason


def weights_after(expected: dict[str, Tensor], path: str, change: Tensor) -> dict[str, Tensor]:
    return {**expected, f"{path}.weight": expected[f"{path}.weight"] + change}


CONV, LINEAR = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def lycoris(name: str) -> tuple[str, dict[str, Tensor], Any]:
    """One module's tensors and what LyCORIS computes from them, written with loops of ``torch`` alone."""
    draw = torch.Generator().manual_seed(5)
    make = lambda *shape: torch.randn(shape, generator=draw) * 0.3  # noqa: E731
    if name == "cp convolution":
        down, mid, up = make(3, 8, 1, 1), make(3, 3, 3, 3), make(8, 3, 1, 1)
        # The three convolutions one after another, seen as one kernel: their answer to a unit impulse.
        impulse = torch.eye(8)[:, :, None, None] * pad(torch.ones(1, 1, 1, 1), (2, 2, 2, 2))
        answer = conv2d(conv2d(conv2d(impulse, down), mid), up)
        kernel = answer.transpose(0, 1).flip(2, 3)
        return CONV, {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, 2 / 3 * kernel
    if name == "loha":
        parts = {"hada_w1_a": make(16, 2), "hada_w1_b": make(2, 16), "hada_w2_a": make(16, 2), "hada_w2_b": make(2, 16)}
        w1a, w1b, w2a, w2b = parts.values()
        return LINEAR, parts, (w1a @ w1b) * (w2a @ w2b)
    if name == "lokr of full matrices":
        w1, w2 = make(2, 4), make(4, 2, 3, 3)
        kron = torch.stack([torch.kron(w1, w2[:, :, i, j]) for i in range(3) for j in range(3)], -1).reshape(8, 8, 3, 3)
        return CONV, {"lokr_w1": w1, "lokr_w2": w2}, kron
    w1, a, b = make(4, 4), make(4, 2), make(2, 4)
    return LINEAR, {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, torch.kron(w1, a @ b)


@pytest.mark.parametrize("name", ["cp convolution", "loha", "lokr of full matrices", "lokr"])
def test_lycoris(program, merge, worst_difference, tmp_path, name):
    """α is 2; products of full matrices have no rank and take no scale of it."""
    path, parts, change = lycoris(name)
    tensors = {f"{flat(path)}.{part}": tensor for part, tensor in parts.items()}
    save_file({**tensors, f"{flat(path)}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    after, record = merge(program, tmp_path / "a.safetensors")
    assert record.sites == (path,)
    assert worst_difference(after, weights_after(small_unet().state_dict(), path, change)) <= 1e-6


def test_linears_written_as_convolutions(program, merge, worst_difference, tmp_path):
    """And the other way round: sd-scripts follows the model that it trained on."""
    tensors: dict[str, Tensor] = {}
    expected = small_unet().state_dict()
    for path, (down, up) in factors(small_unet(), ("attn1.to_q", "proj_in")).items():
        flip = (lambda x: x[:, :, 0, 0]) if down.ndim == 4 else (lambda x: x[:, :, None, None])
        tensors |= module(flat(path), flip(down).contiguous(), flip(up).contiguous(), 2.0)
        expected[f"{path}.weight"] = expected[f"{path}.weight"] + torch.einsum("or...,ri...->oi...", up, down)
    save_file(tensors, tmp_path / "a.safetensors")
    after, record = merge(program, tmp_path / "a.safetensors")
    assert len(record.sites) == len(tensors) // 3
    assert worst_difference(after, expected) <= 1e-6


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("path", [CONV, LINEAR])
def test_dora_scale_of_either_axis(program, merge, worst_difference, tmp_path, path, axis):
    """LyCORIS: W' = dora_scale · (W+ΔW)/‖W+ΔW‖, the norms of rows [out, 1…] or of columns [1, in…]."""
    [(down, up)] = factors(small_unet(), (path,)).values()
    weight = small_unet().state_dict()[f"{path}.weight"]
    change = weight + torch.einsum("or...,ri...->oi...", up, down) * 0.5
    kept = 0 if axis == "out" else 1
    norm = change.transpose(0, kept).flatten(1).norm(dim=1)
    shape = [size if dim == kept else 1 for dim, size in enumerate(weight.shape)]
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5) * norm.reshape(shape)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale, "alpha": torch.tensor(1.0)}
    save_file({f"{flat(path)}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    after, _ = merge(program, tmp_path / "a.safetensors")
    expected = {**small_unet().state_dict(), f"{path}.weight": scale * change / norm.reshape(shape)}
    assert worst_difference(after, expected) <= 1e-6


def test_an_alpha_here_and_not_there(program, merge, tmp_path):
    tensors = kohya(small_unet(), ("attn1.to_q", "attn1.to_k"))
    missing = next(name for name in tensors if name.endswith("to_k.alpha"))
    del tensors[missing]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"to_k\.lora_down\.weight' has no 'alpha' beside it"):
        merge(program, tmp_path / "a.safetensors")


def test_the_configuration_says_what_names_depend_on():
    """A refit knows the paths of the adapted weights alone, which have no resnet in them to count."""
    unet = small_unet()
    whole = {path: name for name, path in ldm_names(path for path, _ in unet.named_modules()).items()}
    adapted = [path for path in whole if "attn1.to_q" in path or "upsamplers" in path]
    found = ldm_names([*adapted, *layout_paths(unet.config)])
    assert len(adapted) == 5
    assert {path: found_name for found_name, path in found.items() if path in adapted} == {p: whole[p] for p in adapted}
    assert not layout_paths({"model_type": "clip", "layers_per_block": 2})
