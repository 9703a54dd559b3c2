"""A saved Program, read as a vendor's torch reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from optpass.environments.apart import saved_programs
from optpass.interchange.storage import save_program
from optpass.testing import capture_module

INTEGERS = torch.ops.quantized_decomposed


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k = (layer(x).reshape(2, 5, 2, 4).transpose(1, 2) for layer in self.inner.values())
        plain = nn.functional.scaled_dot_product_attention(q, k, k)
        masked = nn.functional.scaled_dot_product_attention(q, k, k, mask, scale=0.3)
        return plain + masked


class Shared(nn.Module):
    """One dequantised value with two readers, beside a weight without zero points."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (8, 8), dtype=torch.int8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = INTEGERS.quantize_per_tensor(x, 0.05, 0, -128, 127, torch.int8)
        x = INTEGERS.dequantize_per_tensor(x, 0.05, 0, -128, 127, torch.int8)
        w = INTEGERS.dequantize_per_channel(self.weight, self.running_var, None, 0, -127, 127, torch.int8)
        return nn.functional.linear(x, w) + x


def test_the_same_numbers_with_attention_written_out(tmp_path: Path) -> None:
    program, real = capture_module(Attention, x=torch.zeros(2, 5, 8), mask=torch.zeros(5, 5))
    save_program(program, tmp_path)
    exported = saved_programs.read(str(tmp_path), "full")
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" not in operators
    assert "aten.softmax.int" in operators
    x, mask = torch.randn(2, 5, 8), torch.randn(5, 5)
    (found,) = exported.module(check_guards=False)(x, mask)
    torch.testing.assert_close(found, real(x, mask), atol=1e-5, rtol=1e-5)
    paths = {saved_programs.path_of(node) for node in exported.graph.nodes if "linear" in node.name}
    assert paths == {"inner.q", "inner.k"}


def test_readers_get_their_own_dequantisation_and_channels_their_zero_points(tmp_path: Path) -> None:
    program, real = capture_module(Shared, x=torch.zeros(3, 8))
    save_program(program, tmp_path)
    exported = saved_programs.read(str(tmp_path), "full")
    found = [node for node in exported.graph.nodes if "dequantize_per" in str(node.target)]
    assert len(found) == 3
    assert all(len(node.users) == 1 for node in found)
    assert all(node.args[2] is not None for node in found)
    x = torch.randn(3, 8)
    torch.testing.assert_close(exported.module(check_guards=False)(x)[0], real(x))
