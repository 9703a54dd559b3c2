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


class Handing(nn.Module):
    """Sums that a ReLU, a pooling, an enlargement, a split, a selection and a concatenation hand on. [2, 3, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, image):
        stem = torch.relu(self.stem(image))
        added = torch.relu(stem - 3 * self.other(image))
        small = nn.functional.interpolate(nn.functional.max_pool2d(added, 2), scale_factor=2.0)
        left, right = (0.2 * stem).split(4, 1)
        return self.last(torch.cat([small, left, right], 1)) * right.select(3, 0)[..., None]


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


class Hybrid(nn.Module):
    """A convolutional stage whose last convolution, ``bridge``, makes an attention's tokens. Input [2, 3, 8, 8].

    ``skewed``: the bridge is depthwise, and the channels that it reads differ in size by orders of magnitude.
    """

    def __init__(self, skewed=False):
        super().__init__()
        self.skewed = skewed
        self.stem, self.local = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.bridge = nn.Conv2d(16, 16, 3, padding=1, groups=16) if skewed else nn.Conv2d(16, 16, 1)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        x = nn.functional.silu(self.local(torch.relu(self.stem(x))))
        if self.skewed:
            x = x * torch.logspace(-2, 1, 16).reshape(-1, 1, 1)
        tokens = self.bridge(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).reshape(*tokens.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind()
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((tokens + self.out(attended)).mean(1))
