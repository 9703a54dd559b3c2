"""The models of the quantisation benchmark: a checkpoint folder, the module itself, calibration calls and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests" / "checkpoints"
CALIBRATION, HELD_OUT = 16, 4
Call = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """``checkpoint`` is a folder that optpass takes, ``module`` the same weights in PyTorch, float32.

    ``calls`` are for calibration, ``others`` for the measured error, by input name in the order of ``module``'s call.
    ``passes`` come before ``quantize``, and ``keep`` is its option.
    """

    title: str
    checkpoint: Path
    module: nn.Module
    calls: list[Call]
    others: list[Call]
    passes: tuple[str, ...] = ("simplify",)
    keep: tuple[str, ...] = ()
    transformer: bool = False


def subjects(folder: Path) -> dict[str, Callable[[], Subject]]:
    """What makes each subject; checkpoints with random weights are written under ``folder``."""
    return {
        "resnet50": lambda: _resnet(folder / "resnet50"),
        "dit": lambda: _dit(folder / "dit"),
        "moving-digits": _moving_digits,
        "digits-vit": _digits_vit,
    }


def _split(calls: list[Call]) -> tuple[list[Call], list[Call]]:
    return calls[:CALIBRATION], calls[CALIBRATION : CALIBRATION + HELD_OUT]


def _resnet(folder: Path) -> Subject:
    """ResNet-50 with random weights, its running statistics taken from what it computes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig()).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(4, 3, 224, 224))
    model.eval().save_pretrained(folder)
    calls = [{"pixel_values": torch.randn(1, 3, 224, 224)} for _ in range(CALIBRATION + HELD_OUT)]
    module = _Output(model, "logits")
    return Subject(
        "ResNet-50, 224×224, random weights", folder, module, *_split(calls), passes=("reparameterize", "simplify")
    )


def _dit(folder: Path) -> Subject:
    """DiT-S/2 of 6 blocks with random weights (every one: the released initialisation has zeros)."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=6, sample_size=32, in_channels=4, out_channels=8
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale)
    model.save_pretrained(folder)
    total = CALIBRATION + HELD_OUT
    calls = [
        {
            "hidden_states": torch.randn(1, 4, 32, 32),
            "timestep": torch.tensor([999 - 997 * index // total]),
            "class_labels": torch.tensor([index * 37 % 1000]),
        }
        for index in torch.randperm(total).tolist()
    ]
    title = "DiT-S/2, 6 blocks, 256 tokens, random weights"
    return Subject(title, folder, _Output(model, "sample"), *_split(calls), transformer=True)


def _moving_digits() -> Subject:
    """The trained UNet, on what its own pipeline calls it with."""
    from diffusers import UNetSpatioTemporalConditionModel

    from optpass.capture.sources import capture
    from optpass.evaluate.calibration_set import sampled_set
    from optpass.runtime.sampling import Asked

    folder = CHECKPOINTS / "moving-digits"
    program = capture(str(folder), dtype=torch.float32)
    seen = sampled_set(program, folder, Asked(), count=CALIBRATION + HELD_OUT, samples=2, seed=100)
    ((_, found),) = seen.entries.items()
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    calls = [dict(found[index]) for index in order]
    model = UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    names = tuple(calls[0])
    # What the pass sensitivity finds: 1 % of the MACs, and most of the noise.
    keep = ("*.conv_shortcut",)
    return Subject("moving-digits UNet, trained", folder, _Named(model, names), *_split(calls), keep=keep)


def _digits_vit() -> Subject:
    """The trained classifier, on scans that it was and was not trained on."""
    from sklearn.datasets import load_digits
    from torch.nn.functional import interpolate
    from transformers import ViTForImageClassification

    folder = CHECKPOINTS / "digits-vit"
    model = ViTForImageClassification.from_pretrained(folder, torch_dtype=torch.float32).eval()
    size, channels = model.config.image_size, model.config.num_channels
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    images = interpolate(images, (size, size), mode="bilinear") * 2 - 1
    images = images.expand(-1, channels, -1, -1)
    calls = [{"pixel_values": image[None].clone()} for image in (*images[:CALIBRATION], *images[-HELD_OUT:])]
    return Subject("digits-vit, trained", folder, _Output(model, "logits"), *_split(calls), transformer=True)


class _Output(nn.Module):
    """A model that returns one of its outputs, as exporters want it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.model(*inputs), self.name)


class _Named(nn.Module):
    """A UNet that takes tensors in the order of ``names``."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True))).sample
