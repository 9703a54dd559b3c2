"""Adapters beside the layers that they adapt, not merged: the graph's text, and peft's own unmerged answer."""

from __future__ import annotations

import pytest
import torch
from adapted_layers import Layers, randomise_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from optpass.adapters.branches import add_branches
from optpass.adapters.matching import Adaptable, match_adapter
from optpass.adapters.reading import read_adapter
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.text import graph_text
from optpass.testing import capture_module


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).flatten(2).mT)


def branched(program, folder, strength=1.0):
    matched = match_adapter(read_adapter(folder), Adaptable.of(program))
    plan = {name: [(found, strength)] for name, found in matched.weights.items()}
    after = add_branches(program.copy(), plan)
    verify(after)
    verify_shapes(after)
    return after


def test_golden(tmp_path):
    program, _ = capture_module(Pair, x=torch.zeros(1, 3, 8, 8))
    tensors = {"conv.lora_A.weight": torch.ones(2, 3, 3, 3), "conv.lora_B.weight": torch.ones(4, 2, 1, 1)}
    tensors |= {"linear.lora_A.weight": torch.ones(2, 4), "linear.lora_B.weight": torch.ones(5, 2)}
    tensors |= {"linear.lora_magnitude_vector": torch.ones(5)}
    save_file(tensors, tmp_path / "lora.safetensors")
    after = branched(program, tmp_path / "lora.safetensors")
    assert graph_text(after.entries["full"]) == (
        "graph(x: f32[1, 3, 8, 8]):\n"
        "  %conv2d = conv2d(%x, @conv.weight, @conv.bias, [2, 2], [1, 1]) : f32[1, 4, 4, 4]  ; conv\n"
        "  %conv2d_default = conv2d(%x, @conv.lora_A, None, [2, 2], [1, 1], [1, 1], 1) : f32[1, 2, 4, 4]  ; conv\n"
        "  %conv2d_default_1 = conv2d(%conv2d_default, @conv.lora_B) : f32[1, 4, 4, 4]  ; conv\n"
        "  %add_tensor = add.Tensor(%conv2d, %conv2d_default_1) : f32[1, 4, 4, 4]  ; conv\n"
        "  %flatten = reshape(%add_tensor, [1, 4, 16]) : f32[1, 4, 16]  ; (root)\n"
        "  %m_t = mT(%flatten) : f32[1, 16, 4]  ; (root)\n"
        "  %linear_default = linear(%m_t, @linear.weight, None) : f32[1, 16, 5]  ; linear\n"
        "  %linear_default_1 = linear(%m_t, @linear.lora_A, None) : f32[1, 16, 2]  ; linear\n"
        "  %linear_default_2 = linear(%linear_default_1, @linear.lora_B) : f32[1, 16, 5]  ; linear\n"
        "  %add_tensor_1 = add.Tensor(%linear_default, %linear_default_2) : f32[1, 16, 5]  ; linear\n"
        "  %mul_tensor = mul.Tensor(%add_tensor_1, @linear.lora_magnitude) : f32[1, 16, 5]  ; linear\n"
        "  %add_tensor_2 = add.Tensor(%mul_tensor, @linear.bias) : f32[1, 16, 5]  ; linear\n"
        "  return output=%add_tensor_2"
    )
    assert set(after.weights) - set(program.weights) == {
        *("conv.lora_A", "conv.lora_B", "linear.lora_A", "linear.lora_B", "linear.lora_magnitude")
    }


@pytest.mark.parametrize("dora", [False, True])
def test_as_peft_computes_it_unmerged(layers, tmp_path, dora):
    real = Layers().eval()
    real.load_state_dict({name: value.evaluate().clone() for name, value in layers.weights.items()})
    targets = ["conv_in", "point", "line", "to_q", "to_k"]
    model = get_peft_model(real, LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora)).eval()
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    after = branched(layers, tmp_path)
    inputs = {"x": torch.randn(2, 4, 6, 6)}
    with torch.no_grad():
        expected = {"output": model(**inputs)}
    assert outputs_difference(expected, program_runner(after, "full")(inputs)).relative_error <= 1e-5
    assert program_difference(layers, after).relative_error > 1e-3
