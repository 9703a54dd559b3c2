"""Names of adapters' tensors, by the layouts that trainers write."""

from __future__ import annotations

import pytest

from optpass.adapters.keys import ModuleKey, TensorKey, parse

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = Q.replace(".", "_")

KNOWN = {
    f"base_model.model.{Q}.lora_A.weight": ("", Q, "down"),
    f"base_model.model.{Q}.lora_B.default.weight": ("", Q, "up"),
    f"base_model.model.{Q}.lora_magnitude_vector": ("", Q, "magnitude"),
    f"base_model.model.{Q}.lora_magnitude_vector.default.weight": ("", Q, "magnitude"),
    f"base_model.model.{Q}.hada_w1_a": ("", Q, "hada.w1_a"),
    f"base_model.model.{Q}.lokr_t2": ("", Q, "lokr.t2"),
    f"unet.{Q}.lora_B.weight": ("unet", Q, "up"),
    f"unet.{Q}.lora.down.weight": ("unet", Q, "down"),
    f"unet.{Q}.alpha": ("unet", Q, "alpha"),
    f"unet.base_model.model.{Q}.lora_A.weight": ("unet", Q, "down"),
    "unet.mid_block.attentions.0.attn1.processor.to_q_lora.up.weight": (
        "unet",
        "mid_block.attentions.0.attn1.to_q",
        "up",
    ),
    "mid_block.attn1.processor.to_out_lora.down.weight": ("", "mid_block.attn1.to_out.0", "down"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": (
        "text_encoder",
        "text_model.encoder.layers.0.self_attn.out_proj",
        "up",
    ),
    "text_encoder_2.text_model.encoder.layers.3.mlp.fc1.lora_linear_layer.down.weight": (
        "text_encoder_2",
        "text_model.encoder.layers.3.mlp.fc1",
        "down",
    ),
    "transformer.single_transformer_blocks.7.attn.to_k.lora_A.weight": (
        "transformer",
        "single_transformer_blocks.7.attn.to_k",
        "down",
    ),
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": ("", "blocks.0.self_attn.q", "down"),
}


@pytest.mark.parametrize("key", KNOWN)
def test_dotted(key):
    component, path, factor = KNOWN[key]
    assert parse(key) == TensorKey(ModuleKey(component, path), factor)


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("lora_unet_", "unet"),
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("lora_te3_", "text_encoder_3"),
        ("lora_transformer_", "transformer"),
        ("lycoris_", ""),
    ],
)
@pytest.mark.parametrize(
    ("end", "factor"),
    [
        ("lora_down.weight", "down"),
        ("lora_up.weight", "up"),
        ("lora_mid.weight", "mid"),
        ("alpha", "alpha"),
        ("dora_scale", "magnitude"),
        ("hada_t1", "hada.t1"),
        ("lokr_w2_b", "lokr.w2_b"),
    ],
)
def test_underscored(prefix, component, end, factor):
    assert parse(f"{prefix}{FLAT}.{end}") == TensorKey(ModuleKey(component, FLAT, flat=True), factor)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"base_model.model.{Q}.oft_R.weight", "OFT"),
        (f"lora_unet_{FLAT}.oft_blocks", "OFT"),
        (f"base_model.model.{Q}.boft_R", "BOFT"),
        (f"base_model.model.{Q}.vera_lambda_b", "VeRA"),
        (f"base_model.model.{Q}.ia3_l", "IA³"),
        (f"base_model.model.{Q}.lora_E", "AdaLoRA"),
        (f"base_model.model.{Q}.lora_B.bias", "a bias of the low-rank branch (lora_bias)"),
        (f"base_model.model.{Q}.bias", "a whole bias (saved by bias: all or lora_only)"),
        ("base_model.model.classifier.weight", "a whole weight (saved by modules_to_save)"),
        ("base_model.model.embeddings.lora_embedding_A", "a LoRA of an embedding"),
        (f"lora_unet_{FLAT}.diff", "a full difference of weights"),
        ("string_to_param.*", "no tensor of an adapter by its name"),
    ],
)
def test_what_is_not_merged_is_named(key, what):
    found = parse(key)
    assert not found.factor
    assert found.unsupported == what


def test_a_module_may_be_called_as_a_component():
    assert str(parse("base_model.model.transformer.h.0.mlp.lora_A.weight").module) == "transformer.h.0.mlp"
