"""Transformers models: encoders of images, clips and texts, detectors, segmenters, depth, SAM 2's parts.

``full`` is the ``config.json`` of the checkpoint that ``note`` names, without what equals the library's defaults.
"""

from __future__ import annotations

from typing import Any

from case import Case

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = {**SMALL, "image_size": 16, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 48, "eos_token_id": 49}
PAIR = {"text_config": TEXT, "vision_config": PATCHES}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
CLIP_L_TEXT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
CLIP_L_VISION = {**LARGE, "patch_size": 14}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
RESNET = {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic", **STAGES}
SWIN = {"model_type": "swin", "image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8}
PYRAMID = {**SWIN, "image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
FOUR_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
DINOV2 = {"model_type": "dinov2", **SMALL, "num_hidden_layers": 4, "mlp_ratio": 2, "image_size": 32, "patch_size": 4}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "image_size": [64, 32],
    "hidden_size": 8,
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
}
SAM2_VISION = {
    "backbone_config": HIERA,
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 8], [8, 4], [4, 2]],
    "fpn_hidden_size": 8,
}


def of(model_type: str, architecture: str, **config: Any) -> dict[str, Any]:
    """A ``config.json``."""
    return {"model_type": model_type, "architectures": [architecture], **config}


IMAGES = [
    Case(
        "ViT",
        of("vit", "ViTForImageClassification", **{**PATCHES, "image_size": [24, 16]}, num_labels=3),
        {"pixel_values": (2, 3, 24, 16)},
        full=of("vit", "ViTForImageClassification", num_labels=1000),
        published=86.6e6,
        dynamic=("batch",),
        limits={
            "dynamic:height": r"shape '\[1, 4, 4, 16\]' is invalid",
            "dynamic:width": r"shape '\[1, 4, 4, 16\]' is invalid",
        },
        note="google/vit-base-patch16-224",
    ),
    Case(
        "ViT, positions resampled",
        of("vit", "ViTModel", **PATCHES),
        {"pixel_values": (2, 3, 32, 24)},
        full=of("vit", "ViTModel"),
        full_inputs={"pixel_values": (1, 3, 384, 288)},
        dynamic=("batch", "height", "width"),
        note="google/vit-base-patch16-224-in21k",
    ),
    Case(
        "DINOv2",
        of("dinov2", "Dinov2Model", **PATCHES, mlp_ratio=2),
        {"pixel_values": (2, 3, 32, 24)},
        full=of("dinov2", "Dinov2Model", image_size=518),
        published=86.6e6,
        dynamic=("batch", "height", "width"),
        note="facebook/dinov2-base",
    ),
    Case(
        "DINOv2 giant",
        of("dinov2", "Dinov2Model", **PATCHES, mlp_ratio=2, use_swiglu_ffn=True),
        {"pixel_values": (2, 3, 32, 24)},
        full=of(
            "dinov2",
            "Dinov2Model",
            hidden_size=1536,
            num_hidden_layers=40,
            num_attention_heads=24,
            image_size=518,
            use_swiglu_ffn=True,
        ),
        published=1136.5e6,
        dynamic=("batch", "height", "width"),
        note="facebook/dinov2-giant, whose fused projections are cut when they load",
    ),
    Case(
        "DINOv3 ViT",
        of("dinov3_vit", "DINOv3ViTModel", **PATCHES, num_register_tokens=2),
        {"pixel_values": (2, 3, 32, 24)},
        full=of(
            "dinov3_vit",
            "DINOv3ViTModel",
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            num_register_tokens=4,
        ),
        published=85.7e6,
        dynamic=("batch", "height", "width"),
        note="facebook/dinov3-vitb16-pretrain-lvd1689m",
    ),
    Case(
        "DINOv3 ConvNeXt",
        of("dinov3_convnext", "DINOv3ConvNextModel", **STAGES),
        {"pixel_values": (2, 3, 128, 192)},
        full=of("dinov3_convnext", "DINOv3ConvNextModel"),
        published=27.8e6,
        dynamic=("batch", "height", "width"),
        note="facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
    ),
    Case(
        "Swin",
        {"architectures": ["SwinForImageClassification"], **SWIN, "depths": [2, 2], "num_heads": [1, 2]},
        {"pixel_values": (2, 3, 64, 96)},
        full=of("swin", "SwinForImageClassification", num_labels=1000),
        published=28.3e6,
        dynamic=("batch", "height", "width"),
        note="microsoft/swin-tiny-patch4-window7-224",
    ),
    Case(
        "CvT",
        of(
            "cvt",
            "CvtForImageClassification",
            embed_dim=[8, 12, 16],
            depth=[1, 2, 3],
            num_heads=[1, 2, 2],
            num_labels=3,
        ),
        {"pixel_values": (2, 3, 64, 96)},
        full=of("cvt", "CvtForImageClassification", num_labels=1000),
        published=20.0e6,
        dynamic=("batch", "height", "width"),
        note="microsoft/cvt-13",
    ),
    Case(
        "ConvNeXt V2",
        of("convnextv2", "ConvNextV2ForImageClassification", **STAGES, num_labels=3),
        {"pixel_values": (2, 3, 64, 96)},
        full=of("convnextv2", "ConvNextV2ForImageClassification", num_labels=1000),
        published=28.6e6,
        dynamic=("batch", "height", "width"),
        note="facebook/convnextv2-tiny-1k-224",
    ),
    Case(
        "ResNet",
        {"architectures": ["ResNetForImageClassification"], **RESNET, "num_labels": 3},
        {"pixel_values": (2, 3, 64, 96)},
        full=of("resnet", "ResNetForImageClassification", num_labels=1000),
        published=25.6e6,
        dynamic=("batch", "height", "width"),
        note="microsoft/resnet-50",
    ),
    Case(
        "MobileViT",
        of(
            "mobilevit",
            "MobileViTForImageClassification",
            hidden_sizes=[8, 12, 16],
            neck_hidden_sizes=[4, 4, 8, 8, 12, 16, 24],
            num_attention_heads=2,
            num_labels=3,
        ),
        {"pixel_values": (2, 3, 64, 96)},
        full=of("mobilevit", "MobileViTForImageClassification", num_labels=1000),
        published=5.6e6,
        dynamic=("batch",),
        limits={
            "dynamic:height": r"takes only some sizes of height",
            "dynamic:width": r"takes only some sizes of width",
        },
        note="apple/mobilevit-small",
    ),
]

PAIRS_AND_TEXTS = [
    Case(
        "SigLIP",
        of("siglip", "SiglipModel", **PAIR),
        {"input_ids": (2, 4), "pixel_values": (2, 3, 32, 24)},
        full=of("siglip", "SiglipModel"),
        published=203.2e6,
        dynamic=("batch", "tokens", "height", "width"),
        note="google/siglip-base-patch16-224",
    ),
    Case(
        "SigLIP vision",
        of("siglip_vision_model", "SiglipVisionModel", **PATCHES),
        {"pixel_values": (2, 3, 32, 24)},
        full=of("siglip_vision_model", "SiglipVisionModel"),
        dynamic=("batch", "height", "width"),
        note="google/siglip-base-patch16-224",
    ),
    Case(
        "CLIP",
        of("clip", "CLIPModel", **PAIR, projection_dim=8),
        {"input_ids": (2, 4)},
        full=of("clip", "CLIPModel", text_config=CLIP_L_TEXT, vision_config=CLIP_L_VISION, projection_dim=768),
        published=427.6e6,
        dynamic=("batch", "tokens", "height", "width"),
        note="openai/clip-vit-large-patch14",
    ),
    Case(
        "CLIP text",
        of("clip_text_model", "CLIPTextModel", **TEXT),
        {"input_ids": (2, 4)},
        full=of("clip_text_model", "CLIPTextModel", **CLIP_L_TEXT),
        published=123.1e6,
        dynamic=("batch", "tokens"),
        note="openai/clip-vit-large-patch14, as SD 1.5 has it",
    ),
    Case(
        "CLIP vision",
        of("clip_vision_model", "CLIPVisionModel", **PATCHES),
        {"pixel_values": (2, 3, 32, 24)},
        full=of("clip_vision_model", "CLIPVisionModel", **CLIP_L_VISION),
        published=303.2e6,
        dynamic=("batch", "height", "width"),
        note="openai/clip-vit-large-patch14",
    ),
    Case(
        "T5 encoder",
        of(
            "t5",
            "T5EncoderModel",
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
        {"input_ids": (2, 4)},
        full=of(
            "t5",
            "T5EncoderModel",
            d_model=4096,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        ),
        full_inputs={"input_ids": (1, 512)},
        published=4762.3e6,
        dynamic=("batch", "tokens"),
        note="google/t5-v1_1-xxl, as Flux and SD 3 have it",
    ),
]

CLIPS = [
    Case(
        "VideoMAE",
        of(
            "videomae",
            "VideoMAEForVideoClassification",
            **{**PATCHES, "image_size": [24, 16]},
            num_frames=4,
            tubelet_size=2,
            num_labels=3,
        ),
        {"pixel_values": (2, 4, 3, 24, 16)},
        full=of("videomae", "VideoMAEForVideoClassification", num_labels=400),
        published=86.5e6,
        dynamic=("batch",),
        limits={
            "dynamic:frames": r"takes frames from 4 to 5, not",
            "dynamic:height": r"code fixes height at 24",
            "dynamic:width": r"code fixes width at 16",
        },
        note="MCG-NJU/videomae-base-finetuned-kinetics",
    ),
    Case(
        "ViViT",
        of(
            "vivit",
            "VivitForVideoClassification",
            **{**PATCHES, "image_size": [24, 16]},
            num_frames=4,
            tubelet_size=[2, 4, 4],
            num_labels=3,
        ),
        {"pixel_values": (2, 4, 3, 24, 16)},
        full=of("vivit", "VivitForVideoClassification", num_labels=400),
        published=89.0e6,
        dynamic=("batch",),
        limits={
            "dynamic:frames": r"takes frames from 4 to 5, not",
            "dynamic:height": r"shape '\[1, 6, 6, 16\]' is invalid",
            "dynamic:width": r"shape '\[1, 6, 6, 16\]' is invalid",
        },
        note="google/vivit-b-16x2-kinetics400",
    ),
    Case(
        "TimeSformer",
        of("timesformer", "TimesformerForVideoClassification", **PATCHES, num_frames=4, num_labels=3),
        {"pixel_values": (2, 4, 3, 24, 16)},
        full=of("timesformer", "TimesformerForVideoClassification", num_labels=400),
        published=121.4e6,
        dynamic=("batch",),
        limits={
            "dynamic:frames": r"code fixes frames at 4",
            "dynamic:height": r"takes height from 16 to 19, not",
            "dynamic:width": r"takes only some sizes of width",
        },
        note="facebook/timesformer-base-finetuned-k400",
    ),
]

DENSE = [
    Case(
        "DETR",
        of(
            "detr",
            "DetrForObjectDetection",
            backbone_config={**RESNET, "out_features": ["stage4"]},
            use_timm_backbone=False,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=5,
        ),
        {"pixel_values": (2, 3, 128, 192)},
        full=of(
            "detr",
            "DetrForObjectDetection",
            backbone_config={"model_type": "resnet", "out_features": ["stage4"]},
            use_timm_backbone=False,
            num_labels=91,
        ),
        full_inputs={"pixel_values": (1, 3, 800, 1088)},
        published=41.6e6,
        dynamic=("batch", "height", "width"),
        note="facebook/detr-resnet-50, with the library's own ResNet for timm's",
    ),
    Case(
        "Mask2Former",
        of(
            "mask2former",
            "Mask2FormerForUniversalSegmentation",
            backbone_config={**PYRAMID, **FOUR_STAGES},
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_layers=1,
            decoder_layers=3,
            num_attention_heads=2,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            num_queries=5,
        ),
        {"pixel_values": (2, 3, 128, 192)},
        # Its masked attention thresholds at 0.5: a value that rounding moves across hides a key or shows it.
        rtol=1e-3,
        full=of(
            "mask2former",
            "Mask2FormerForUniversalSegmentation",
            backbone_config={
                "model_type": "swin",
                "depths": [2, 2, 6, 2],
                "num_heads": [3, 6, 12, 24],
                **FOUR_STAGES,
            },
            num_labels=80,
        ),
        full_inputs={"pixel_values": (1, 3, 384, 384)},
        published=47.4e6,
        dynamic=("batch",),
        limits={
            "dynamic:height": "takes only some sizes of height",
            "dynamic:width": "takes only some sizes of width",
        },
        note="facebook/mask2former-swin-tiny-coco-instance",
    ),
    Case(
        "DPT",
        of(
            "dpt",
            "DPTForDepthEstimation",
            **{**PATCHES, "num_hidden_layers": 4, "image_size": 32},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[4, 8, 12, 16],
            fusion_hidden_size=8,
        ),
        {"pixel_values": (2, 3, 48, 48)},
        full=of(
            "dpt",
            "DPTForDepthEstimation",
            **LARGE,
            backbone_out_indices=[5, 11, 17, 23],
            neck_hidden_sizes=[256, 512, 1024, 1024],
        ),
        published=343e6,
        dynamic=("batch",),
        limits={
            "dynamic:height": r"shape '\[2, 9, 9, 16\]' is invalid",
            "dynamic:width": r"shape '\[2, 9, 9, 16\]' is invalid",
        },
        note="Intel/dpt-large",
    ),
    Case(
        "Depth Anything",
        of(
            "depth_anything",
            "DepthAnythingForDepthEstimation",
            backbone_config={**DINOV2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
            patch_size=4,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[4, 8, 12, 16],
            fusion_hidden_size=8,
            head_hidden_size=4,
        ),
        {"pixel_values": (2, 3, 24, 16)},
        full=of(
            "depth_anything",
            "DepthAnythingForDepthEstimation",
            backbone_config={
                "model_type": "dinov2",
                "hidden_size": 384,
                "num_attention_heads": 6,
                "image_size": 518,
                "out_indices": [3, 6, 9, 12],
                "reshape_hidden_states": False,
            },
        ),
        published=24.8e6,
        dynamic=("batch",),
        limits={
            "dynamic:height": r"takes height from 32 to 35, not",
            "dynamic:width": r"takes only some sizes of width",
        },
        note="depth-anything/Depth-Anything-V2-Small-hf",
    ),
    Case(
        "SAM 2 image encoder",
        of("sam2_vision_model", "Sam2VisionModel", **SAM2_VISION),
        {"pixel_values": (2, 3, 64, 32)},
        full=of("sam2_vision_model", "Sam2VisionModel"),
        dynamic=("batch",),
        limits={"dynamic:height": r"cannot be solved", "dynamic:width": r"cannot be solved"},
        note="facebook/sam2.1-hiera-tiny",
    ),
    Case(
        "SAM 2 memory attention",
        of(
            "sam2_video",
            "Sam2VideoModel",
            memory_attention_hidden_size=128,
            memory_attention_num_layers=2,
            memory_attention_feed_forward_hidden_size=32,
            memory_attention_rope_feat_sizes=[4, 3],
            num_maskmem=2,
            max_object_pointers_in_encoder=3,
        ),
        component="memory_attention",
        full=of("sam2_video", "Sam2VideoModel"),
        published=38.9e6,
        dynamic=("batch",),
        limits={"dynamic:memory_tokens": r"Could not guard on data-dependent expression"},
        note="facebook/sam2.1-hiera-tiny, whose parameters are the whole tracker's",
    ),
]

CASES = [*IMAGES, *PAIRS_AND_TEXTS, *CLIPS, *DENSE]
