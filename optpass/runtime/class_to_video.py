"""Class-conditioned latent video diffusion: the pipeline that the `moving-digits` checkpoint belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import CLIPTextModel

from optpass.errors import UserError

OUTPUTS = ("pt", "np", "latent")


@dataclass
class ClassToVideoOutput(BaseOutput):  # type: ignore[misc]
    """``frames``: clips [B, F, C, H, W] in [0, 1], or for ``output_type="latent"`` normalised latents."""

    frames: Tensor | np.ndarray[Any, Any]


class ClassToVideoPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Labels → clips: noise, denoised by a spatio-temporal UNet that sees one class token, decoded frame by frame.

    ``unet`` may be replaced by anything with the call
    ``(sample, timestep, encoder_hidden_states, added_time_ids, return_dict=False) -> (velocity,)``: what the pipeline
    needs to know about shapes is in its own config, not in the UNet's.

    Sources: DDIM, Song et al. 2020; classifier-free guidance, Ho & Salimans 2022; ``added_time_ids`` as in Stable Video
    Diffusion, Blattmann et al. 2023.
    """

    model_cpu_offload_seq = "class_encoder->unet->vae"

    def __init__(
        self,
        unet: Any,
        vae: AutoencoderTiny,
        scheduler: DDIMScheduler,
        class_encoder: CLIPTextModel,
        num_classes: int = 10,
        num_frames: int = 8,
        height: int = 32,
        width: int = 32,
        fps: float = 7.0,
        motion_bucket_id: float = 140.0,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, class_encoder=class_encoder)
        self.register_to_config(
            num_classes=num_classes,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
        )

    @classmethod
    def load(cls, folder: Path | str, *, unet: Any = None, dtype: torch.dtype = torch.float32) -> ClassToVideoPipeline:
        """The pipeline in ``folder``, its weights cast to ``dtype``; with ``unet``, the folder's own is not read.

        Raises:
            UserError: the folder is not a ClassToVideoPipeline, or a component is missing or damaged.
        """
        place = Path(folder)
        try:
            index = json.loads((place / "model_index.json").read_text("utf-8"))
            if index["_class_name"] != cls.__name__:
                raise UserError(f"{place} holds a {index['_class_name']}, not a {cls.__name__}")
            options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
            if unet is None:
                unet = UNetSpatioTemporalConditionModel.from_pretrained(place, subfolder="unet", **options).eval()
            vae = AutoencoderTiny.from_pretrained(place, subfolder="vae", **options).eval()
            scheduler = DDIMScheduler.from_pretrained(place, subfolder="scheduler", local_files_only=True)
            encoder = CLIPTextModel.from_pretrained(
                place, subfolder="class_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
            ).eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot load a {cls.__name__} from {place}: {error}") from error
        settings = {key: value for key, value in index.items() if not key.startswith("_") and not _is_component(value)}
        return cls(unet, vae, scheduler, encoder, **settings)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        motion_bucket_id: float | None = None,
        output_type: str = "pt",
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> ClassToVideoOutput:
        """One clip for each of ``labels``.

        Args:
            labels: B classes.
            num_inference_steps: DDIM steps.
            guidance_scale: 1 is none, with B instead of 2·B clips in a call of the UNet.
            seed: clip i draws its noise, on the CPU, from ``seed + i``, so a clip does not depend on its neighbours.
            seeds: B seeds, one per clip, in place of ``seed``.
            generator: draws the B seeds instead.
            num_frames: as trained by default; so are ``height`` and ``width``, in pixels.
            height: a multiple of the autoencoder's scale.
            width: as ``height``.
            fps: conditioning; as trained by default.
            motion_bucket_id: conditioning, the object's speed; the checkpoint's card gives the unit.
            output_type: "pt" or "np" for frames, "latent" for the normalised latents.
            callback: called after each step with its index, its timestep and the latents.

        Raises:
            UserError: a label out of range, or sizes, seeds or an output type that do not fit.
        """
        classes = self._check_labels(labels)
        if output_type not in OUTPUTS:
            raise UserError(f"output_type is one of {', '.join(OUTPUTS)}, not {output_type!r}")
        shape = self._latent_shape(
            num_frames or self.config.num_frames, height or self.config.height, width or self.config.width
        )
        latents = torch.stack([_noise(shape, one) for one in _clip_seeds(len(classes), seed, seeds, generator)])
        guided = guidance_scale != 1
        context = self._encode_labels(classes, guided)
        speed = self.config.motion_bucket_id if motion_bucket_id is None else motion_bucket_id
        ids = torch.tensor([[self.config.fps if fps is None else fps, speed, 0.0]]).repeat(len(context), 1)
        self.scheduler.set_timesteps(num_inference_steps)
        for index, timestep in enumerate(self.scheduler.timesteps):
            velocity = self._velocity(latents, timestep, context, ids, guidance_scale)
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
            if callback is not None:
                callback(index, timestep, latents)
        return ClassToVideoOutput(frames=self._finish(latents, output_type))

    def _velocity(self, latents: Tensor, timestep: Tensor, context: Tensor, ids: Tensor, guidance: float) -> Tensor:
        """The UNet's answer in float32; with guidance, from one call on [without class, with class]."""
        dtype = getattr(self.unet, "dtype", torch.float32)
        sample = torch.cat([latents, latents]) if len(context) > len(latents) else latents
        output = self.unet(sample.to(dtype), timestep, context.to(dtype), ids.to(dtype), return_dict=False)
        answer: Tensor = output[0].float()
        if len(context) == len(latents):
            return answer
        count = len(latents)
        return torch.lerp(answer[:count], answer[count:], guidance)

    def _encode_labels(self, classes: Tensor, guided: bool) -> Tensor:
        """Context tokens [B, 1, D], or [2·B, 1, D] with those of the null class first."""
        if guided:
            classes = torch.cat([torch.full_like(classes, self.config.num_classes), classes])
        tokens: Tensor = self.class_encoder(input_ids=classes[:, None]).last_hidden_state
        return tokens.float()

    def _finish(self, latents: Tensor, output_type: str) -> Tensor | np.ndarray[Any, Any]:
        if output_type == "latent":
            return latents
        settings = self.vae.config
        plain = latents.flatten(0, 1) / settings.scaling_factor + settings.shift_factor
        images = self.vae.decode(plain.to(self.vae.dtype)).sample.float()
        frames: Tensor = (images / 2 + 0.5).clamp(0, 1).unflatten(0, latents.shape[:2])
        return frames.numpy() if output_type == "np" else frames

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        scale = 2 ** (len(self.vae.config.decoder_block_out_channels) - 1)
        if height % scale or width % scale:
            raise UserError(f"height and width are multiples of {scale}, not {height} and {width}")
        return frames, self.vae.config.latent_channels, height // scale, width // scale

    def _check_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        classes = torch.as_tensor(labels, dtype=torch.long)
        last = self.config.num_classes - 1
        if classes.ndim != 1 or len(classes) == 0 or classes.min() < 0 or classes.max() > last:
            raise UserError(f"labels is a list of classes from 0 to {last}, not {labels}")
        return classes


def _is_component(value: Any) -> bool:
    """Whether a value of model_index.json is a ``[library, class]`` pair."""
    return isinstance(value, list) and len(value) == 2


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _clip_seeds(count: int, seed: int, seeds: Sequence[int] | None, generator: torch.Generator | None) -> list[int]:
    if seeds is not None and len(seeds) != count:
        raise UserError(f"{count} labels need {count} seeds, not {len(seeds)}")
    if seeds is not None:
        return list(seeds)
    if generator is not None:
        drawn: list[int] = torch.randint(2**31, (count,), generator=generator, device=generator.device).tolist()
        return drawn
    return [seed + index for index in range(count)]
