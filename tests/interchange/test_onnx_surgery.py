"""Attention in ONNX, rewritten: the same function, in fewer operators; what must stay stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.interchange.onnx_surgery import biases_first, dequantise_weights, fusible_attention
from optpass.testing import capture_module

BATCH, HEADS, TOKENS, SIZE = 2, 3, 5, 16


class Attention(nn.Module):
    """Self-attention over ``x`` [batch, tokens, heads · size]; ``mask`` as the attention operator takes it."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HEADS * SIZE, HEADS * SIZE) for _ in range(3))
        self.out = nn.Linear(HEADS * SIZE, HEADS * SIZE)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        heads = [made(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for made in (self.query, self.key, self.value)]
        mask = None if self.mask is None else self.mask.expand(BATCH, 1, TOKENS, TOKENS)
        y = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def written(build: Any, folder: Path, rewrite: Any, **inputs: Tensor) -> tuple[Counter[str], list[Any], list[str]]:
    """Operators of the model that ``rewrite`` leaves, what ONNX Runtime answers to random inputs, names of nodes."""
    program, _ = capture_module(build, **inputs)
    folder.mkdir()
    path = write_onnx_folder(program, folder, rewrite=rewrite).paths["full"]
    model = onnx.load(path)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(path)
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal(value.shape).astype(np.float32) for name, value in inputs.items()}
    operators = Counter(node.op_type for node in model.graph.node)
    return operators, session.run(None, feeds), [node.name for node in model.graph.node]


def both(build: Any, folder: Path, rewrite: Any = fusible_attention, **inputs: Tensor) -> Any:
    before, expected, _ = written(build, folder / "before", None, **inputs)
    counted: list[int] = []
    after, found, names = written(build, folder / "after", lambda model: counted.append(rewrite(model)), **inputs)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    return before, after, counted[0], names


X = torch.zeros(BATCH, TOKENS, HEADS * SIZE)


def test_keys_are_transposed_once_and_the_scale_is_applied_once(tmp_path: Path) -> None:
    before, after, count, names = both(Attention, tmp_path, x=X)
    assert (before["Mul"], after["Mul"]) == (2, 1)
    assert before["Reshape"] - after["Reshape"] == 2
    assert count == 2
    # Provenance survives.
    assert all(name.split("/")[0] in ("query", "key", "value", "out", "(root)") for name in names)


def test_a_scale_that_is_a_power_of_two_rounds_nothing(tmp_path: Path) -> None:
    program, _ = capture_module(Attention, x=X)
    path = write_onnx_folder(program, tmp_path, rewrite=fusible_attention).paths["full"]
    model = onnx_ir.load(path)
    [scaled] = [node for node in model.graph if node.op_type == "Mul"]
    assert float(scaled.inputs[1].const_value.numpy()) == SIZE**-0.5


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)])
def test_a_mask_that_hides_nothing_goes_with_its_guard(mask: Tensor, tmp_path: Path) -> None:
    before, after, _, _ = both(lambda: Attention(mask), tmp_path, x=X)
    assert before["Add"] == 5
    assert (after["IsNaN"], after["Where"], after["Expand"]) == (0, 0, 0)
    assert after["Add"] == 4


@pytest.mark.parametrize("constant", [-2.5, torch.finfo(torch.float32).min])
def test_a_mask_of_another_constant_stays(constant: float, tmp_path: Path) -> None:
    """The lowest number swallows every logit: all keys count alike then."""
    _, after, _, _ = both(lambda: Attention(torch.full((1, 1, 1, 1), constant)), tmp_path, x=X)
    assert after["Add"] == 5


def test_a_constant_mask_that_leaves_every_row_a_key_loses_the_guard_alone(tmp_path: Path) -> None:
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    _, after, _, _ = both(lambda: Attention(causal), tmp_path, x=X)
    assert after["IsNaN"] == 0
    assert after["Add"] == 5


class Masked(nn.Module):
    """Attention with a mask that the caller gives."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask > 0)


def test_the_guard_of_a_given_mask_stays(tmp_path: Path) -> None:
    """A row may have no key; its answer is zero."""
    inputs = {"x": torch.zeros(1, 1, TOKENS, SIZE), "mask": torch.zeros(1, 1, TOKENS, TOKENS)}
    _, after, _, _ = both(Masked, tmp_path, **inputs)
    assert (after["IsNaN"], after["Where"]) == (1, 2)


class Hidden(Attention):
    """A constant mask under which one query sees nothing."""

    def __init__(self) -> None:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
        mask[1] = False
        super().__init__(mask[None, None])


def test_the_guard_stays_where_a_row_has_no_key(tmp_path: Path) -> None:
    _, after, _, _ = both(Hidden, tmp_path, x=X)
    assert after["IsNaN"] == 1


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    def twice(model: onnx_ir.Model) -> None:
        assert fusible_attention(model) > 0
        assert fusible_attention(model) == 0
        assert biases_first(model) == 4
        assert biases_first(model) == 0

    written(Attention, tmp_path / "twice", twice, x=X)


def test_biases_stand_in_front_of_products(tmp_path: Path) -> None:
    before, after, count, _ = both(Attention, tmp_path, biases_first, x=X)
    assert count == 4
    assert before == after


@pytest.mark.parametrize("zero", [0, 3])
def test_constants_are_dequantised_as_the_operator_does(zero: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(-127, 127, (6, 4), dtype=np.int8)
    held = {
        "w": weights,
        "steps": np.linspace(0.01, 0.04, 4, dtype=np.float32),
        "zeros": np.full(4, zero, dtype=np.int8),
    }
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "steps", "zeros"], ["real"], "layer/weight", axis=1),
        onnx.helper.make_node("MatMul", ["x", "real"], ["y"], "layer/linear"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 4])],
        [onnx.numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    path = tmp_path / "full.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    feeds = {"x": generator.standard_normal((2, 6)).astype(np.float32)}
    expected = feeds["x"] @ ((weights.astype(np.float32) - zero) * held["steps"])
    assert dequantise_weights(path, {"another/weight"}) == 0
    assert dequantise_weights(path, {"layer/weight"}) == 1
    assert [node.op_type for node in onnx.load(path).graph.node] == ["MatMul"]
    [found] = onnxruntime.InferenceSession(path).run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
