"""Checkpoints whose names or layouts are not the module's: transformers' own loading is the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import core_model_loading as loading

from optpass.capture.checkpoint_weights import folder_weights
from optpass.capture.sources import capture
from optpass.capture.transformers_weights import Recorded, module_weights
from optpass.errors import UserError
from optpass.ir.weights import Constant, Expression

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SWIGLU = {**SMALL, "image_size": 16, "patch_size": 4, "mlp_ratio": 2, "use_swiglu_ffn": True}
EXPERTS = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 11, "vocab_size": 20, "head_dim": 8}
MODELS: dict[str, Callable[[], Any]] = {
    "chunked": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SWIGLU)),
    "stacked and joined": lambda: transformers.MixtralModel(transformers.MixtralConfig(**EXPERTS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_converted_weights_are_those_that_transformers_saved(name: str, tmp_path: Path, random_weights: Any) -> None:
    model = random_weights(MODELS[name]())
    model.save_pretrained(tmp_path)
    found = folder_weights(tmp_path)
    assert found is not None
    assert set(found) != set(model.state_dict())
    weights = module_weights(model, found)
    assert set(weights) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key].evaluate(), value)


def test_a_model_with_converted_weights_computes_what_transformers_computes(
    tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    model = random_weights(MODELS["chunked"]())
    model.save_pretrained(tmp_path)
    program = capture(tmp_path)
    assert_same_function(program, model)
    gate = next(expression for name, expression in program.weights.items() if name.endswith("gate_proj.weight"))
    assert str(gate).startswith("select(")


CONVERSIONS: dict[str, tuple[Any, dict[str, list[tuple[int, ...]]]]] = {
    "chunk": (loading.WeightConverter("qkv", ["q", "k", "v"], [loading.Chunk(dim=1)]), {"qkv": [(2, 12)]}),
    "concatenate": (
        loading.WeightConverter(["a", "b"], "ab", [loading.Concatenate(dim=1)]),
        {"a": [(2, 3)], "b": [(2, 5)]},
    ),
    "stack": (
        loading.WeightConverter("experts.*.w", "experts.w", [loading.MergeModulelist(dim=0)]),
        {"experts.*.w": [(2, 3)] * 3},
    ),
    "transpose": (loading.WeightConverter("a", "b", [loading.Transpose(1, 2)]), {"a": [(2, 3, 5)]}),
    "interleave": (
        loading.WeightConverter("w13", ["gate", "up"], [loading.Interleave(dim=0), loading.Chunk(dim=0)]),
        {"w13": [(8, 3)]},
    ),
    "flatten": (loading.WeightConverter("a", "b", [loading.Conv3dToLinear(2, (2, 3, 3))]), {"a": [(4, 2, 2, 3, 3)]}),
    "rotary": (loading.WeightConverter("a", "b", [loading.PermuteForRope()]), {"a": [(16, 6)]}),
    "rotary bias": (loading.WeightConverter("a", "b", [loading.PermuteForRope(inverse=True)]), {"a": [(16,)]}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_recorded_conversion_gives_what_the_conversion_gives(name: str) -> None:
    converter, shapes = CONVERSIONS[name]
    sources = {pattern: [torch.randn(shape) for shape in many] for pattern, many in shapes.items()}
    target = converter.target_patterns[0]

    def converted(wrap: Callable[[Tensor], Any]) -> dict[str, Any]:
        for pattern, tensors in sources.items():
            for index, tensor in enumerate(tensors):
                converter.add_tensor(target, f"{pattern}{index}", pattern, wrap(tensor))
        config = transformers.LlamaConfig(num_attention_heads=2)
        return dict(converter.convert(target, model=None, config=config))

    expected = converted(lambda tensor: tensor)
    found = converted(lambda tensor: Recorded(Constant(tensor)))
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        want, got = (value[0] if isinstance(value, list) else value for value in (want, found[key]))
        assert torch.equal(got.expression.evaluate(), want)


def test_a_name_that_fits_already_is_left_alone(random_weights: Any) -> None:
    model = random_weights(MODELS["chunked"]())
    weights = module_weights(model, {name: Constant(value) for name, value in model.state_dict().items()})
    assert set(weights) == set(model.state_dict())


class Doubled:
    """A converter's operation that computes on values."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **others: Any) -> dict[str, Any]:
        (values,) = input_dict.values()
        return {target_patterns[0]: torch.mul(values[0], 2)}


def test_a_conversion_that_computes_is_refused_with_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping

    class Model(nn.Linear):
        base_model_prefix = ""
        config = None

    rules = [loading.WeightConverter("half", "weight", [Doubled()])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda module: rules)
    found: dict[str, Expression] = {"half": Constant(torch.ones(2, 3)), "bias": Constant(torch.ones(2))}
    with pytest.raises(UserError, match=r"computes 'weight' from 'half' .* \(mul computes on values\)"):
        module_weights(Model(3, 2), found)


def test_pieces_that_do_not_add_up_are_refused(tmp_path: Path, random_weights: Any) -> None:
    model = random_weights(MODELS["chunked"]())
    model.save_pretrained(tmp_path)
    found = folder_weights(tmp_path)
    assert found is not None
    fused = {name: leaf.evaluate() for name, leaf in found.items()}
    name = next(name for name in fused if name.endswith("weights_in.weight"))
    save_file({**fused, name: fused[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"do not fit the model: .*proj\.weight"):
        capture(tmp_path)
