"""Cached transformers in unmodified diffusers pipelines: the engines make what the same schedule makes in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from block_oracles import Extrapolated, Kept, Memory, range_cache
from torch import Tensor, nn

import optpass as library
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.testing import randomised

STEPS = 6


def _autoencoder(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **options,
    )


def dit() -> Any:
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
    return DiTPipeline(transformer=transformer, vae=_autoencoder(), scheduler=DDIMScheduler(clip_sample=False))


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = _autoencoder(shift_factor=0.1)
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)


def wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=None, text_encoder=None)


def ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=12,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return LTXPipeline(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=None, text_encoder=None)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _words(seed: int, *shape: int, mask: bool = False) -> dict[str, Tensor]:
    words = {"prompt_embeds": _random(seed, *shape), "negative_prompt_embeds": _random(seed + 1, *shape)}
    if mask:
        ones = torch.ones(shape[:2])
        words |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return words


@contextmanager
def every(transformer: Any, period: int, memory: Callable[[], Memory] = Kept, sides: int = 1) -> Iterator[None]:
    """The eager cache of all blocks but the first, for a pipeline that asks ``sides`` times a step."""
    remembered: dict[int, Memory] = {}
    count = -1

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal count
        count = (count + 1) % (STEPS * sides)
        if count < sides:
            remembered[count] = memory()
        if isinstance(side := remembered[count % sides], Extrapolated):
            side.tick()

    class Side:
        """The memory of whoever asks now."""

        def update(self, residual: Tensor) -> None:
            remembered[count % sides].update(residual)

        def predict(self) -> Tensor:
            return remembered[count % sides].predict()

    blocks = transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks
    handle = transformer.register_forward_pre_hook(begin, with_kwargs=True)
    with range_cache(blocks[1], transformer.norm_out, lambda: count // sides % period == 0, Side()):
        yield
    handle.remove()


@contextmanager
def first_block(transformer: Any, threshold: float) -> Iterator[None]:
    """diffusers' own first-block cache."""
    from diffusers import FirstBlockCacheConfig

    transformer.enable_cache(FirstBlockCacheConfig(threshold))
    yield
    transformer.disable_cache()


@dataclass(frozen=True)
class Kind:
    """A pipeline, the sizes of its transformer's inputs, a call, the pass's options, and the same in eager."""

    make: Callable[[], Any]
    inputs: dict[str, Any]
    call: dict[str, Any]
    options: dict[str, Any]
    eager: Callable[[Any], Any]
    result: str = "frames"
    statistics: dict[str, int] = field(default_factory=dict)


KINDS = {
    # Guidance in one batch of two.
    "dit": Kind(
        dit,
        {"hidden_states": [2, 4, 8, 8]},
        {"class_labels": [3], "guidance_scale": 4.0},
        {"every": 2},
        lambda transformer: every(transformer, 2),
        "images",
        {"full": 3, "reuse": 3},
    ),
    # Guidance distilled: one call of one.
    "flux": Kind(
        flux,
        {"hidden_states": [1, 24, 16], "encoder_hidden_states": [1, 5, 16]},
        {
            "prompt_embeds": _random(1, 1, 5, 16),
            "pooled_prompt_embeds": _random(2, 1, 16),
            "height": 16,
            "width": 24,
        },
        {"method": "threshold", "threshold": 0.6},
        lambda transformer: first_block(transformer, 0.6),
        "images",
    ),
    # Guidance in two calls a step.
    "wan": Kind(
        wan,
        {"hidden_states": [1, 16, 2, 4, 6], "encoder_hidden_states": [1, 5, 8]},
        {**_words(3, 1, 5, 8), "height": 32, "width": 48, "num_frames": 5, "guidance_scale": 3.0},
        {"method": "taylor", "every": 3, "order": 1},
        lambda transformer: every(transformer, 3, lambda: Extrapolated(1), sides=2),
        "frames",
        {"full": 4, "reuse": 8},
    ),
    "ltx": Kind(
        ltx,
        {"frames": [2], "height": [2], "width": [3], "encoder_hidden_states": [2, 7, 12]},
        {**_words(5, 1, 7, 12, mask=True), "height": 64, "width": 96, "num_frames": 9, "guidance_scale": 3.0},
        {"every": 3},
        lambda transformer: every(transformer, 3),
        "frames",
        {"full": 2, "reuse": 4},
    ),
}


SLOW = ("ltx",)
"""Kinds whose way of calling another one has too."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in KINDS])
def test_the_same_as_the_schedule_in_eager(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    pipeline = kind.make()
    randomised(pipeline.transformer.eval())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    passes = [{"cache-blocks": kind.options}]
    recipe = make_recipe({"passes": passes, "inputs": kind.inputs, "target": {"onnxruntime": {"threads": 1}}})
    request = Request(str(tmp_path / "pipeline"), tmp_path / "bundle", verify="never", baseline=False)
    bundle = apply(recipe, request).folder

    def made(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        asked = {**kind.call, "num_inference_steps": STEPS, "generator": generator}
        output_type = "np" if name == "dit" else "latent"
        with torch.no_grad():
            return torch.as_tensor(pipeline(**asked, output_type=output_type)[kind.result])

    whole = made(1)
    eager = pipeline.transformer
    with kind.eager(eager):
        expected = [made(seed) for seed in (1, 2)]
    pipeline.transformer = library.load(bundle)
    found = [made(seed) for seed in (1, 2)]
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())
    assert float((found[0] - whole).abs().max()) > 1e-2 * float(whole.abs().max())
    counts = pipeline.transformer.statistics
    if kind.statistics:
        assert counts == {entry: 2 * number for entry, number in kind.statistics.items()}
    else:
        assert 2 < counts["body"] < counts["head"] == 2 * STEPS
