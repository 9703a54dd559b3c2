"""One attention layer as a Program, and engines of several forms of it timed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from engines import engine
from torch import Tensor, nn
from torch.nn import functional

from optpass.evaluate.latency import Latency, Ratio, milliseconds
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program
from optpass.testing import capture_module

HEAD = 64


class AttentionLayer(nn.Module):
    """x + MSA(norm(x)) over the pixels of [batch, channels, height, width], or of a clip with frames before these."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).mT
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def times(programs: Mapping[str, Program], seconds: float, least: int, most: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each in ONNX Runtime on one thread, in turn, after one that is not timed.

    As many turns as take about ``seconds``, of ``least`` to ``most``.
    """
    inputs = next(iter(programs.values())).entries["full"].inputs_at()
    call = [random_inputs(inputs, {}, seed=0)]
    found: dict[str, list[float]] = {name: [] for name in programs}
    with torch.no_grad():
        engines = {name: engine(program) for name, program in programs.items()}
        first = sum(milliseconds(each, call) for each in engines.values())
        turns = max(least, min(most, int(seconds * 1e3 / first)))
        for _ in range(turns):
            for name, each in engines.items():
                found[name].append(milliseconds(each, call))
    return found


def layer(sizes: Sequence[int], width: int) -> Program:
    """Of tokens on a grid of ``sizes``: rows and columns, behind frames where there are three."""
    image = torch.zeros(1, width, *sizes)
    return capture_module(partial(AttentionLayer, width, width // HEAD), image=image)[0]


def told(times: Sequence[float]) -> str:
    """The median in milliseconds, with the spread."""
    found = Latency.of("", times)
    return f"{figures(found.median)} ({figures(found.p10)} … {figures(found.p90)})"


def faster(ratio: Ratio) -> str:
    """The inverse of a ratio of times, with the spread of the pairs."""
    return f"{1 / ratio.median:.2f}× ({1 / ratio.p90:.2f} … {1 / ratio.p10:.2f})"


def figures(value: float) -> str:
    """Three digits, and all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: str, rows: Iterable[str]) -> str:
    """In Markdown, ``head`` being its first row."""
    return "\n".join([head, "|".join(["", *["---"] * (head.count("|") - 1), ""]), *rows])
