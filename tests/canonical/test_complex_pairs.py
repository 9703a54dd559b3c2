"""Complex arithmetic in real numbers: rotary embeddings as models write them, and every operator with a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.ir.graph import Graph
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import capture_module


class Rotary(nn.Module):
    """A complex table in a plain attribute, sliced, broadcast, and multiplied with pairs of channels."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.table = torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        rows = torch.cat([self.table[-2:], self.table[: x.shape[1] - 2]]).unsqueeze(1)
        return torch.view_as_real(turned * rows).flatten(3).type_as(x)


class Applies(nn.Module):
    """A function of two complex values made of real ones, returned as pairs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.view_as_real(self.function(torch.view_as_complex(x), torch.view_as_complex(y)).resolve_conj())


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, y: x * y,
    "product of two ranks": lambda x, y: x * y[0],
    "product with a number": lambda x, y: x * 2.5 + 3 * y,
    "product with a real tensor": lambda x, y: y.real * x,
    "quotient by a number": lambda x, y: x / 2.5 - y,
    "quotient by a real tensor": lambda x, y: x / (2 + y.imag),
    "sum, difference": lambda x, y: (x + y) - (-x),
    "conjugate": lambda x, y: x * y.conj(),
    "polar": lambda x, y: torch.polar(x.abs(), y.real) + x,
    "complex": lambda x, y: torch.complex(x.real, y.imag),
    "transpose": lambda x, y: x.transpose(-1, -2) * y.transpose(0, 1),
    "permute": lambda x, y: x.permute(-1, 0) * y.permute(1, 0),
    "slices": lambda x, y: x[:, 1:] * y[..., -1:] + x[1][None, None, 0] * y[:, 1:],
    "stack and cat": lambda x, y: torch.cat([torch.stack([x, y], -1), torch.stack([y, x], -1)], -2),
    "split": lambda x, y: x.split(2, -1)[0] * y.split([1, 3], dim=1)[0],
    "unbind": lambda x, y: x.unbind(0)[1] * y.unbind(-2)[0],
    "expand and repeat": lambda x, y: x[:1].expand(3, -1) * y[:1].repeat(3, 1),
    "reshape": lambda x, y: x.reshape(2, -1) * y.flatten()[:6].view(6),
    "index": lambda x, y: x[:, torch.tensor([0, 2, 2])] * y[torch.tensor([2, 0, 1])][:, :3],
    "flip": lambda x, y: x.flip(-1) * y.flip([0]),
    "squeeze": lambda x, y: x.unsqueeze(-1).squeeze(-1) * y.unsqueeze(0).squeeze(0),
}


def complex_nodes(graph: Graph) -> list[str]:
    values = [(node.name, node.meta.get("val")) for node in graph.fx.nodes if node.op != "output"]
    return [name for name, value in values if isinstance(value, Tensor) and value.is_complex()]


def test_rotary_embeddings(through_onnx_runtime: Any) -> None:
    found = through_onnx_runtime(Rotary, x=torch.randn(2, 5, 3, 8))
    assert not any("complex" in name for name in found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operator_with_a_rule(name: str, through_onnx_runtime: Any) -> None:
    inputs = {"x": torch.randn(3, 4, 2), "y": torch.randn(3, 4, 2)}
    through_onnx_runtime(lambda: Applies(FUNCTIONS[name]), **inputs)
    program, _ = capture_module(lambda: Applies(FUNCTIONS[name]), **inputs)
    assert complex_nodes(program.entries["full"]) == []


def test_an_operator_without_a_rule_stays_complex_and_is_refused() -> None:
    inputs = {"x": torch.randn(3, 4, 2), "y": torch.randn(3, 4, 2)}
    program, module = capture_module(lambda: Applies(lambda x, y: x.exp() * y), **inputs)
    assert complex_nodes(program.entries["full"])
    with torch.no_grad():
        (found,) = program.entries["full"].module(program.weights)(*inputs.values())
        torch.testing.assert_close(found, module(**inputs))
    reasons = [item.reason for item in OnnxRuntime().supports(program)]
    assert any("c64" in reason for reason in reasons)
