"""Pipelines of diffusers' own classes, with tiny random models and tokenizers made here, and their bundles."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.sampling import Asked
from optpass.testing import randomised

WORDS = ("a", "cat", "dog", "photograph", "of", "garden", "in", "the", "that", "sits")


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of letters and a few words, 16 tokens long."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip_text(tokenizer: Any, *, projection: bool = False, width: int = 16) -> Any:
    """A CLIP text encoder of one layer for ``tokenizer``."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def kl_autoencoder(latents: int = 4) -> Any:
    """A two-level AutoencoderKL: a latent is half as high as its image."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.1,
    )


def tiny_autoencoder() -> Any:
    """An AutoencoderTiny of the same scale."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def condition_unet(width: int = 16, **options: Any) -> Any:
    """A two-level UNet2DConditionModel over latents of 12×12."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 12,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": width,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **options})


def stable_diffusion(folder: Path, *, tiny: bool = False) -> Any:
    """StableDiffusionPipeline with AutoencoderKL, or with AutoencoderTiny."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer(folder / "made")
    return StableDiffusionPipeline(
        unet=condition_unet(),
        vae=tiny_autoencoder() if tiny else kl_autoencoder(),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> Any:
    """StableDiffusionXLPipeline with two text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer(folder / "made")
    unet = condition_unet(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=kl_autoencoder(),
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def dit(folder: Path) -> Any:
    """DiTPipeline over ten classes."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=kl_autoencoder(), scheduler=DDIMScheduler(clip_sample=False))


def stable_video_diffusion(folder: Path) -> Any:
    """StableVideoDiffusionPipeline of three frames."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        intermediate_size=32,
        patch_size=32,
    )
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16,
        num_frames=3,
        block_out_channels=(32, 32),  # SVD's group norms have 32 groups, always
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        in_channels=8,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
    )
    return StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(),
    )


def t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer whose vocabulary is a handful of words."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16)


def flux(folder: Path) -> Any:
    """FluxPipeline with CLIP and T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(folder / "made"), t5_tokenizer(folder)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(t5), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    return FluxPipeline(
        transformer=transformer,
        vae=kl_autoencoder(),
        text_encoder=clip_text(clip),
        tokenizer=clip,
        text_encoder_2=encoder,
        tokenizer_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


MAKERS: dict[str, Callable[[Path], Any]] = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-tiny": lambda folder: stable_diffusion(folder, tiny=True),
    "stable-diffusion-xl": stable_diffusion_xl,
    "dit": dit,
    "stable-video-diffusion": stable_video_diffusion,
    "flux": flux,
}


CALLS: dict[str, dict[str, Any]] = {
    "stable-video-diffusion": {"height": 16, "width": 24},
    "flux": {"height": 16, "width": 24, "max_sequence_length": 16},
}
"""Arguments of a call that is small enough; where there are none, the call without any is."""


@dataclass(frozen=True)
class Case:
    """A pipeline folder, the bundle of all its components, and the report."""

    folder: Path
    bundle: Path
    report: Mapping[str, Any]
    asked: Asked


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Pipelines of :data:`MAKERS` with every weight random, as diffusers saves them."""

    @functools.cache
    def make(kind: str) -> Path:
        torch.manual_seed(0)
        place = tmp_path_factory.mktemp(kind)
        pipeline = MAKERS[kind](place)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                randomised(component.eval())
        pipeline.save_pretrained(place / kind)
        return place / kind

    return make


@pytest.fixture(scope="session")
def asked_of() -> Callable[[str], Asked]:
    """What the pipeline of a kind is called with: five steps, a prompt or an image where it takes one."""

    def asked(kind: str) -> Asked:
        call = CALLS.get(kind, {})
        if kind == "stable-video-diffusion":
            from PIL import Image

            noise = Image.effect_noise((call["width"], call["height"]), 90).convert("RGB")
            return Asked(image=noise, steps=5, call=call)
        return Asked(prompt=None if kind == "dit" else "a cat", labels=(3, 5), steps=5, call=call)

    return asked


@pytest.fixture(scope="session")
def case(
    pipeline_folder: Callable[[str], Path],
    asked_of: Callable[[str], Asked],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Case]:
    """A kind's folder with the bundle that ``components: all`` makes of it, through a target."""

    @functools.cache
    def make(kind: str, target: str = "program") -> Case:
        folder, asked = pipeline_folder(kind), asked_of(kind)
        recipe = make_recipe({"components": "all", "call": dict(asked.call), "target": target})
        request = Request(str(folder), tmp_path_factory.mktemp(kind) / "bundle", baseline=False)
        applied = apply(recipe, request)
        return Case(folder, applied.folder, applied.report, asked)

    return make


@pytest.fixture
def optpass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command line in this process: its exit code, standard error, and standard output as JSON."""
    from types import SimpleNamespace

    from optpass import cli

    def run(*arguments: object) -> Any:
        monkeypatch.setattr("sys.argv", ["optpass", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return SimpleNamespace(
            code=code, err=captured.err, json=json.loads(captured.out) if "--json" in arguments else None
        )

    return run
