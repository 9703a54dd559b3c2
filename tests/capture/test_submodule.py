"""One module of a model: what it computes, and under which names its weights are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from optpass.capture.sources import capture
from optpass.errors import UserError

T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MEMORY = {
    "memory_attention_hidden_size": 128,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [4, 3],
    "num_maskmem": 2,
    "max_object_pointers_in_encoder": 3,
}


@pytest.fixture
def t5(tmp_path: Path, random_weights: Any) -> Any:
    model = random_weights(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)))
    model.save_pretrained(tmp_path)
    return model


def test_the_encoder_of_a_pair(t5: Any, tmp_path: Path, assert_same_function: Any) -> None:
    program = capture(tmp_path, component="encoder", inputs={"input_ids": [2, 7]})
    assert_same_function(program, t5.encoder)
    assert program.origin.class_name == "T5Stack"
    # Its embedding is the decoder's too, and the file has it once, under a name outside of the encoder.
    assert "embed_tokens.weight" in program.weights
    assert all(name in t5.encoder.state_dict() for name in program.weights)


def test_a_module_that_is_no_model_takes_the_users_sizes(t5: Any, tmp_path: Path, assert_same_function: Any) -> None:
    program = capture(tmp_path, component="encoder.block.0.layer.1", inputs={"hidden_states": [2, 5, 16]})
    assert_same_function(program, t5.encoder.block[0].layer[1])


def test_a_module_without_a_config_asks_for_sizes(t5: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inputs of T5LayerFF.* --inputs NAME"):
        capture(tmp_path, component="encoder.block.0.layer.1")


def test_memory_attention_of_a_tracker(tmp_path: Path, random_weights: Any, assert_same_function: Any) -> None:
    model = random_weights(transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**MEMORY)))
    model.save_pretrained(tmp_path)
    program = capture(tmp_path, component="memory_attention")
    shapes = {spec.name: spec.shape for spec in program.entries["full"].inputs}
    # Two frames of twelve tokens, and three pointers of two.
    assert shapes["memory"] == (30, 1, 64)
    assert shapes["current_vision_features"] == (12, 1, 128)
    assert_same_function(program, model.memory_attention)


def test_a_module_of_a_pipelines_component(
    tmp_path: Path, unet_folder: Path, small_unet: nn.Module, assert_same_function: Any
) -> None:
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    program = capture(tmp_path, component="unet.mid_block", inputs={"hidden_states": [2, 8, 4, 6], "temb": [2, 32]})
    assert_same_function(program, small_unet.get_submodule("mid_block"))
    assert not program.origin.pipeline
    assert program.loop is None


def test_structure_alone(t5: Any, tmp_path: Path) -> None:
    assert not capture(tmp_path, component="encoder", structure_only=True).has_values


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("encodr", "T5ForConditionalGeneration has no module 'encodr'; did you mean 'encoder'"),
        ("encoder.block", r"'encoder.block' is a ModuleList, .* choose one of: encoder\.block\.0$"),
    ],
)
def test_what_cannot_be_captured_is_refused(t5: Any, tmp_path: Path, component: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        capture(tmp_path, component=component)
