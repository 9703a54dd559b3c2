"""Image classifiers of timm, made small by ``model_args`` where the architecture takes them; else whole."""

from __future__ import annotations

from typing import Any

from case import Case


def config(architecture: str, **model_args: Any) -> dict[str, Any]:
    return {"architecture": architecture, "num_classes": 10, "model_args": model_args}


def published(architecture: str, size: int, **more: Any) -> dict[str, Any]:
    """What of a config.json on the hub has a say in the graph."""
    sizes = {"input_size": [3, size, size], "num_classes": 1000, **more}
    return {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": sizes}


IMAGE = {"x": (2, 3, 64, 96)}
FREE = ("batch", "height", "width")
FIXED = "height and width are the model's own: its position embeddings are for one size"

CASES = [
    Case(
        "timm ResNet-50",
        config("resnet50", layers=[1, 1, 1, 1]),
        IMAGE,
        FREE,
        full=published("resnet50", 224),
        published=25.56e6,
    ),
    Case(
        "timm ViT-B/16",
        config("vit_base_patch16_224", img_size=[64, 96], depth=2, embed_dim=48, num_heads=3),
        {"x": (2, 3, 64, 96)},
        ("batch",),
        full=published("vit_base_patch16_224", 224, fixed_input_size=True),
        published=86.57e6,
        note=FIXED,
    ),
    Case(
        "timm EfficientNet-B0",
        config("test_efficientnet"),
        IMAGE,
        FREE,
        full=published("efficientnet_b0", 224),
        published=5.29e6,
    ),
    Case("timm RepVGG-A0", config("repvgg_a0"), IMAGE, FREE, full=published("repvgg_a0", 224), published=9.11e6),
    Case(
        "timm MobileOne-S1", config("mobileone_s1"), IMAGE, FREE, full=published("mobileone_s1", 224), published=4.83e6
    ),
    Case(
        "timm CrossViT-9",
        config("crossvit_9_240", img_size=[120, 240], depth=[[1, 1, 0]]),
        {"x": (2, 3, 120, 240)},
        ("batch",),
        full=published("crossvit_9_240", 240, fixed_input_size=True),
        published=8.55e6,
        note=FIXED,
    ),
    Case(
        "timm TNT-S",
        config("tnt_s_patch16_224", img_size=[64, 96], depth=2),
        IMAGE,
        ("batch",),
        full=published("tnt_s_patch16_224", 224, fixed_input_size=True),
        published=23.76e6,
        note=FIXED,
    ),
]
