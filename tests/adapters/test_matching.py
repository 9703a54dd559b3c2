"""Which weight each module of an adapter changes, and what is said of those that change none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from optpass.adapters.matching import Adaptable, Matched, match_adapter
from optpass.adapters.reading import Adapter, read_adapter
from optpass.errors import UserError
from optpass.ir.program import Origin, Program
from optpass.testing import capture_module


def match(given: Adapter, program: Program, *, strict: bool = True) -> Matched:
    return match_adapter(given, Adaptable.of(program), strict=strict)


def adapter(folder: Path, **layers: tuple[int, int]) -> Adapter:
    """A file with a LoRA of rank 2 for ``[out, in]`` of each name, dots written as ``__``."""
    tensors = {}
    for name, (rows, columns) in layers.items():
        path = name.replace("__", ".")
        tensors |= {f"{path}.lora_A.weight": torch.ones(2, columns), f"{path}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, folder / "lora.safetensors")
    return read_adapter(folder / "lora.safetensors")


def test_by_path_and_by_prefix(layers, tmp_path):
    given = adapter(tmp_path, block__to_q=(12, 8), unet__block__to_k=(6, 12), lora_unet_point=(8, 8))
    found = match(given, layers)
    assert set(found.weights) == {"block.to_q.weight", "block.to_k.weight", "point.weight"}
    assert not found.refused


@pytest.mark.parametrize("name", ["block__to_", "lora_unet_block_to_"])
def test_a_module_that_is_not_there(layers, tmp_path, name):
    given = adapter(tmp_path, **{f"{name}g": (12, 8), f"{name}k": (6, 12)})
    message = r"1 keys cannot be merged; strict: false leaves them out:\n  .*to_g.*did you mean 'block\.to_[qk]'\?"
    with pytest.raises(UserError, match=message):
        match(given, layers)
    found = match(given, layers, strict=False)
    assert set(found.weights) == {"block.to_k.weight"}
    assert [refusal.harmless for refusal in found.refused] == [False]


def test_an_adapter_of_another_model(layers, tmp_path):
    message = (
        r"block\.to_q\.lora_A\.weight: changes a weight of \[12, 9\], and the model's is \[12, 8\] "
        r"\(block\.to_q\.weight\); was it made for another base model\?"
    )
    for strict in (True, False):  # nothing is left to merge either way
        with pytest.raises(UserError, match=message):
            match(adapter(tmp_path, block__to_q=(12, 9)), layers, strict=strict)


def test_two_keys_for_one_weight(layers, tmp_path):
    given = adapter(tmp_path, block__to_q=(12, 8), lora_unet_block_to_q=(12, 8))
    with pytest.raises(
        UserError, match=r"changes block\.to_q\.weight, and so does '.*to_q\.lora_A\.weight' of the same"
    ):
        match(given, layers)


def test_many_keys_are_counted(layers, tmp_path):
    given = adapter(tmp_path, **{f"blocks__{index}__to_q": (4, 4) for index in range(9)})
    with pytest.raises(UserError, match=r"9 keys cannot be merged:\n(  .*\n){5}  and 4 more"):
        match(given, layers)


def test_by_names_and_shapes_alone(layers, tmp_path):
    given = adapter(tmp_path, block__to_q=(12, 8), lora_unet_point=(8, 8))
    found = match_adapter(given, Adaptable.of_weights(layers.weights))
    assert {name: item.keys for name, item in found.weights.items()} == {
        name: item.keys for name, item in match(given, layers).weights.items()
    }
    with pytest.raises(UserError, match=r"did you mean 'block\.to_q'\?"):
        match_adapter(adapter(tmp_path, block__to_g=(12, 8)), Adaptable.of_weights(layers.weights))


class Shared(nn.Module):
    """A weight of two modules, one that an embedding reads, and one under another name than ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.table, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.table.weight
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = self.norm(self.right(torch.relu(self.left(x)))) + self.table(index)
        return self.head(self.attention(y, y, y, need_weights=False)[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("left", r"left\.weight is shared by left and right: a merged weight would change both"),
        ("table", r"table\.weight is read by embedding \(table\), no linear or convolution"),
        ("norm", r"norm\.weight is read by layer_norm \(norm\)"),
        ("attention", r"attention has no weight called attention\.weight, but attention\.in_proj_bias"),
    ],
)
def test_weights_that_are_not_one_layer_s_own(tmp_path, name, reason):
    inputs = {"x": torch.zeros(2, 3, 4), "index": torch.zeros(2, 3, dtype=torch.long)}
    program, _ = capture_module(Shared, **inputs)
    with pytest.raises(UserError, match=reason):
        match(adapter(tmp_path, **{name: (4, 4)}), program)


def test_components_of_a_pipeline(layers, tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    unet = replace(layers, origin=Origin("test", tmp_path, "unet", pipeline=True))
    given = adapter(tmp_path, unet__point=(8, 8), text_encoder__block__to_q=(12, 8))
    found = match(given, unet)
    assert set(found.weights) == {"point.weight"}
    [left] = found.refused
    assert left.harmless
    assert left.reason == "belongs to component text_encoder; give it merge-lora under components:"
    with pytest.raises(
        UserError, match="belongs to component text_encoder_2, which the pipeline does not have; did you"
    ):
        match(adapter(tmp_path, unet__point=(8, 8), text_encoder_2__block__to_q=(12, 8)), unet)
    with pytest.raises(UserError, match=r"changes nothing of this model: text_encoder.*belongs to component"):
        match(adapter(tmp_path, text_encoder__point=(8, 8)), unet)
    # sd-scripts calls a transformer a UNet too.
    transformer = replace(layers, origin=Origin("test", tmp_path, "transformer", pipeline=True))
    assert set(match(adapter(tmp_path, lora_unet_point=(8, 8)), transformer).weights) == {"point.weight"}


def test_a_module_that_was_captured_alone(layers, tmp_path):
    inner = replace(layers, origin=Origin("module of test", tmp_path, "mid"))
    given = adapter(tmp_path, mid__point=(8, 8), mid__block__to_q=(12, 8), down__to_q=(4, 4))
    found = match(given, inner)
    assert set(found.weights) == {"point.weight", "block.to_q.weight"}
    assert [refusal.reason for refusal in found.refused] == ["is outside of mid, which was captured alone"]


def test_names_of_original_code_are_named(layers, tmp_path):
    with pytest.raises(UserError, match="convert the adapter with diffusers"):
        match(adapter(tmp_path, lora_unet_double_blocks_0_img_attn_qkv=(4, 4)), layers)
