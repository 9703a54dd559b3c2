"""The decoder of TAEF2, FLUX.2's tiny autoencoder (madebyollin/taesd), as a Python factory.

Its weights are ``taef2_decoder.pth``, given with ``--weights``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS, WIDTH = 32, 64


def conv(channels: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=bias)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions about a skip; the deepest ones first add what a normalised 1x1 branch says."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))
        self.pool = None
        if branch:
            wide = 4 * WIDTH
            into, out = nn.Conv2d(WIDTH, wide, 1, bias=False), nn.Conv2d(wide, WIDTH, 1, bias=False)
            self.pool = nn.Sequential(into, nn.GroupNorm(4, wide), nn.ReLU(inplace=True), out)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Decoder(nn.Sequential):
    """``latents`` [batch, 32, height, width] to RGB in [0, 1], eight times as high and wide."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [Clamp(), conv(CHANNELS, WIDTH), nn.ReLU()]
        for stage in range(3):
            layers += [Block(branch=stage == 0) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
        super().__init__(*layers, Block(branch=False), conv(WIDTH, 3))

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = super().forward(latents)
        return image


def decoder() -> nn.Module:
    return Decoder()


def decoder_inputs() -> dict[str, Tensor]:
    return {"latents": torch.zeros(2, CHANNELS, 12, 8)}
