"""A small model of every layer that adapters change, and random factors for what peft makes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FACTORS = ("lora_", "hada_", "lokr_")


class Layers(nn.Module):
    """Convolutions with stride, padding, groups and a 1×1 kernel, and linears with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.line = nn.Conv1d(8, 8, 3, padding="same", dilation=1)
        self.block = nn.ModuleDict({"to_q": nn.Linear(8, 12), "to_k": nn.Linear(12, 6, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(torch.relu(self.point(torch.relu(self.conv_in(x)))))
        y = self.line(y.flatten(2)).mT
        return self.block["to_k"](torch.relu(self.block["to_q"](y)))


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, 4, 6, 6, dtype=dtype)


def randomise_adapter(model: nn.Module) -> None:
    """Every factor away from zero, where peft starts; magnitudes away from the norms."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not any(part in name for part in FACTORS):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor * (1 + 0.2 * noise.abs()) if "magnitude" in name else noise * 0.3)
