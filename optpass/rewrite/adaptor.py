"""The ResNet adaptor of Clockwork Diffusion: what carries a feature of an earlier step over to this one.

    φ(r, f, t, c) = f + up(resnet(resnet(down([r, f]) + text(mean c), t), t))

f is the feature of the last full step, r a fresh value of its size, t the embedded time and c the context's tokens.
``down`` is a convolution that halves the resolution, ``up`` a transposed one that doubles it and starts as zero, so
that an adaptor that was not trained is the identity. Its parameters are called ``adaptor.*``.

Source: Habibian et al., arXiv 2312.08128, section 4.2. The widths are not published: 384 makes 13.9 M parameters and
6.4 GFLOP on Stable Diffusion 1.5, where the paper has 14 M and 7.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.boundaries import ancestors, depending_on
from optpass.analysis.operators import aten
from optpass.ir.graph import PATH, Graph, operators, shape_of, value_of
from optpass.ir.loop import Loop
from optpass.ir.sizes import is_size, named
from optpass.ir.weights import Constant, Expression

NAME = "adaptor"
GROUPS = 32
BLOCKS = 2


@dataclass(frozen=True)
class AdaptorInputs:
    """``feature`` [N, C, H, W], ``fresh`` [N, D, H, W], ``time`` [N, T], and a ``context`` [N, L, E] or none."""

    feature: Node
    fresh: Node
    time: Node
    context: Node | None

    def others(self) -> dict[str, Node]:
        """All but the feature, by name."""
        found = {"fresh": self.fresh, "time": self.time, "context": self.context}
        return {name: node for name, node in found.items() if node is not None}


def adaptor_inputs(graph: Graph, loop: Loop, feature: Node, kept: Collection[Node]) -> AdaptorInputs | str:
    """What an adaptor of ``feature`` reads, where a step that reuses computes ``kept`` of ``graph``; or why none can.

    The fresh value is the first one on the way to the feature that has its resolution, and that such a step computes
    or could: what it reads is computed. The time and the context are those that most operators in front of it read.
    """
    shape = shape_of(feature)
    if len(shape) != 4 or not value_of(feature).is_floating_point():
        return f"the resnet adaptor takes images [N, C, H, W], and the feature is {list(shape)}"
    if any(size % 2 != 0 for size in shape[2:]):
        sizes = "×".join(str(named(size, graph.dimensions)) for size in shape[2:])
        return f"the resnet adaptor halves the resolution, and {sizes} need not be even"
    above = ancestors([feature]) - {feature}
    of_sample, of_time = depending_on(graph, [loop.sample]), depending_on(graph, [loop.timestep])
    fixed = depending_on(graph, loop.conditioning) - of_sample - of_time
    tensors = [node for node in (*graph.placeholders, *operators(graph)) if node in above and _is_tensor(node)]
    fresh = [
        node
        for node in tensors
        if node in of_sample and _matches(node, shape, 4) and (_is_read_beyond(node, kept) or node not in kept)
    ]
    times = [node for node in tensors if node in of_time - of_sample and _matches(node, shape, 2)]
    contexts = [node for node in tensors if node in fixed and _matches(node, shape, 3)]
    if not fresh or not times:
        return f"no {'value of the sample' if not fresh else 'embedding of the time'} in front of the cut has its shape"
    return AdaptorInputs(feature, fresh[0], max(times, key=_readers), max(contexts, key=_readers, default=None))


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and value_of(node).is_floating_point()


def _matches(node: Node, shape: tuple[int, ...], rank: int) -> bool:
    """Whether ``node`` has the feature's batch and, where it is an image, its resolution."""
    found = shape_of(node)
    return len(found) == rank and found[0] == shape[0] and (rank != 4 or found[2:] == shape[2:])


def _is_read_beyond(node: Node, kept: Collection[Node]) -> bool:
    return any(user not in kept and not is_size(user) for user in node.users)


def _readers(node: Node) -> int:
    return len(node.users)


def write_adaptor(graph: Graph, inputs: AdaptorInputs, *, width: int) -> tuple[Node, dict[str, Expression]]:
    """Insert the adaptor at the current insertion point: the adapted feature, and the new weights by name.

    ``width`` is the number of channels inside, a multiple of 32.
    """
    writer = _Writer(graph, inputs.feature, width)
    joined = writer.call(NAME, aten.cat.default, [inputs.fresh, inputs.feature], 1)
    hidden = writer.convolution("conv_in", joined, stride=2)
    if inputs.context is not None:
        pooled = writer.call(NAME, aten.mean.dim, inputs.context, [1])
        hidden = writer.add(NAME, hidden, writer.channels("text_proj", pooled))
    for index in range(BLOCKS):
        hidden = writer.resnet(f"resnets.{index}", hidden, inputs.time)
    return writer.add(NAME, inputs.feature, writer.upsampled("conv_out", hidden)), writer.weights


@dataclass
class _Writer:
    """Writes layers of ``width`` channels, with random weights of their own seeds, like the layers of ``feature``."""

    graph: Graph
    feature: Node
    width: int
    weights: dict[str, Expression] = field(default_factory=dict)

    def call(self, path: str, operator: Any, *args: Any) -> Node:
        node = self.graph.call(operator, *args, like=self.feature)
        node.meta = {"val": node.meta["val"], PATH: path}
        return node

    def add(self, path: str, left: Node, right: Node) -> Node:
        return self.call(path, aten.add.Tensor, left, right)

    def convolution(self, name: str, value: Node, *, stride: int = 1) -> Node:
        kernel = self._weight(f"{name}.weight", (self.width, shape_of(value)[1], 3, 3))
        bias = self._weight(f"{name}.bias", (self.width,), 0.0)
        return self.call(f"{NAME}.{name}", aten.conv2d.default, value, kernel, bias, [stride] * 2, [1, 1])

    def upsampled(self, name: str, value: Node) -> Node:
        """A transposed convolution to the feature's size, zero at first."""
        channels = shape_of(self.feature)[1]
        kernel = self._weight(f"{name}.weight", (self.width, channels, 4, 4), 0.0)
        bias = self._weight(f"{name}.bias", (channels,), 0.0)
        return self.call(f"{NAME}.{name}", aten.conv_transpose2d.input, value, kernel, bias, [2, 2], [1, 1])

    def channels(self, name: str, value: Node) -> Node:
        """A linear layer [N, E] → [N, width, 1, 1]."""
        kernel = self._weight(f"{name}.weight", (self.width, shape_of(value)[1]))
        bias = self._weight(f"{name}.bias", (self.width,), 0.0)
        made = self.call(f"{NAME}.{name}", aten.linear.default, value, kernel, bias)
        for _ in range(2):
            made = self.call(f"{NAME}.{name}", aten.unsqueeze.default, made, -1)
        return made

    def resnet(self, name: str, value: Node, time: Node) -> Node:
        hidden = self.convolution(f"{name}.conv1", self._normalised(f"{name}.norm1", value))
        embedded = self.call(f"{NAME}.{name}", aten.silu.default, time)
        hidden = self.add(f"{NAME}.{name}", hidden, self.channels(f"{name}.time_emb_proj", embedded))
        hidden = self.convolution(f"{name}.conv2", self._normalised(f"{name}.norm2", hidden))
        return self.add(f"{NAME}.{name}", value, hidden)

    def _normalised(self, name: str, value: Node) -> Node:
        """silu(group_norm(value))."""
        weight, bias = (
            self._weight(f"{name}.weight", (self.width,), 1.0),
            self._weight(f"{name}.bias", (self.width,), 0.0),
        )
        normed = self.call(f"{NAME}.{name}", aten.group_norm.default, value, GROUPS, weight, bias, 1e-5)
        return self.call(f"{NAME}.{name}", aten.silu.default, normed)

    def _weight(self, name: str, shape: tuple[int, ...], value: float | None = None) -> Node:
        """A new parameter, everywhere ``value`` or uniform within ±1/√(inputs), as PyTorch's layers begin."""
        full = f"{NAME}.{name}"
        made = torch.full(shape, value) if value is not None else _uniform(full, shape)
        self.weights[full] = Constant(made.to(value_of(self.feature).dtype))
        return self.graph.weight(full, self.weights[full], like=self.feature)


def _uniform(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = float(torch.Size(shape[1:]).numel()) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
