"""Small networks that quantisation is tried on."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """Convolutions with a residual stream, and a linear head. Input [2, 3, 16, 16]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 8)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Attention(nn.Module):
    """One attention over tokens, behind an embedding of a timestep. Inputs [2, 6, 16] and [2]."""

    def __init__(self):
        super().__init__()
        self.time, self.enter = nn.Linear(1, 16), nn.Linear(16, 16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.leave = nn.Linear(16, 4)

    def forward(self, x, timestep):
        x = self.enter(x) + self.time(timestep[:, None])[:, None]
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        return self.leave(torch.tanh(self.out(weights @ self.v(x))))
