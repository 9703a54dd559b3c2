"""Trains the `moving-digits` checkpoint: a class-conditioned latent video diffusion model, on CPU.

Stages, in order; each reads what the earlier ones left under `--work`:

    python train.py autoencoder  AutoencoderTiny, one channel, 32×32 → 4×16×16                (about 2 min on 2 cores)
    python train.py classifier   the evaluator: a small ResNet that never sees the held-out digits       (about 3 min)
    python train.py diffusion    UNetSpatioTemporalConditionModel and its class encoder, jointly       (60 to 90 min)
    python train.py export       the folder beside this file, in the layout of a diffusers pipeline, float16
    python train.py evaluate     500 generated clips against real ones → evaluation.json
    python train.py all          the five above

`--resume` continues an interrupted `diffusion` stage: what a step draws depends on the seed and the step's number
alone, and the saved state holds weights, averages and optimizer, so the result is the uninterrupted one, bit for bit.

Data: the 1,797 scanned digits of scikit-learn (the test part of Alpaydın and Kaynak's *Optical Recognition of
Handwritten Digits*, UCI, 1998), in their original order, of which the last fifth is held out.

Sources: DDIM, Song et al. 2020; v-prediction, Salimans & Ho 2022; squared-cosine schedule, Nichol & Dhariwal 2021;
timesteps spread evenly over each batch, Kingma et al. 2021; classifier-free guidance, Ho & Salimans 2022.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNetSpatioTemporalConditionModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, ResNetConfig, ResNetForImageClassification

from optpass.evaluate.quality import (
    Evaluator,
    Quality,
    centroids,
    classify,
    feature_statistics,
    load_classifier,
    psnr,
    temporal_consistency,
)
from optpass.runtime.class_to_video import ClassToVideoPipeline

HERE = Path(__file__).resolve().parent
SIZE, FRAMES = 32, 8
DIGIT_SIZE = 15.0  # pixels; the scans are 8×8
SPEEDS = (0.5, 3.0)  # pixels per frame
MOTION_BUCKETS_PER_SPEED = 80.0
FPS = 7.0
NULL_CLASS = 10
REFERENCE_SEED = 3
FIGURES = ("<!-- figures -->", "<!-- end of figures -->")
LATENT_STD = 0.5  # a clip's frames are redundant: smaller latents leave more steps to decide the shape (Chen 2023)


@dataclass(frozen=True)
class Hyperparameters:
    seed: int = 0
    steps: int = 2400
    timestep_shift: float = 2.5
    batch: int = 16
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    class_dropout: float = 0.1
    save_every_seconds: float = 60.0


# ---------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Clips:
    frames: Tensor  # [N, F, 1, 32, 32] in [0, 1]
    labels: Tensor  # [N], 0 to 9
    motion_bucket_id: Tensor  # [N], speed × 80


def digits(part: str) -> tuple[Tensor, Tensor]:
    """Scans [N, 8, 8] in [0, 1] and labels [N] of `part`: "train" or "held-out"."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    cut = len(images) * 4 // 5
    chosen = slice(None, cut) if part == "train" else slice(cut, None)
    return images[chosen], labels[chosen]


def render(scans: Tensor, corners: Tensor) -> Tensor:
    """Draws scans [N, 8, 8] with their top left corners at `corners` [N, F, 2] (x, y, pixels): [N, F, 1, 32, 32].

    Bicubic from the 8×8 scan straight to each frame's pixel centres, so that motion below a pixel keeps its shape.
    """
    count, frames, _ = corners.shape
    centres = torch.arange(SIZE, dtype=torch.float32) + 0.5
    where = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
    grid = (where - corners.reshape(-1, 1, 1, 2)) / DIGIT_SIZE * 2 - 1
    sprites = scans.repeat_interleave(frames, dim=0).unsqueeze(1)
    drawn = F.grid_sample(sprites, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 1).reshape(count, frames, 1, SIZE, SIZE)


def moving_digits(scans: Tensor, labels: Tensor, count: int, generator: torch.Generator, frames: int = FRAMES) -> Clips:
    """`count` clips of one scan each, at constant speed, reflected by the frame's edges."""
    chosen = torch.randint(len(scans), (count,), generator=generator)
    room = SIZE - DIGIT_SIZE
    start = torch.rand(count, 1, 2, generator=generator) * room
    speed = SPEEDS[0] + torch.rand(count, generator=generator) * (SPEEDS[1] - SPEEDS[0])
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    velocity = speed[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    path = start + velocity[:, None, :] * torch.arange(frames)[None, :, None]
    corners = room - (path.remainder(2 * room) - room).abs()
    return Clips(render(scans[chosen], corners), labels[chosen], (speed * MOTION_BUCKETS_PER_SPEED).round())


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ---------------------------------------------------------------------------------------------- what every stage shares


def learning_rate(step: int, steps: int, peak: float, final: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine from `peak` to `final`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def write_atomically(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Progress:
    """One line with the running loss and the time left, every `every` steps."""

    def __init__(self, stage: str, first: int, steps: int, every: int = 50) -> None:
        self.stage, self.first, self.steps, self.every = stage, first, steps, every
        self.start, self.losses = time.monotonic(), list[float]()

    def report(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        done = step + 1
        if done % self.every and done != self.steps:
            return
        seconds = (time.monotonic() - self.start) / (done - self.first)
        minutes = seconds * (self.steps - done) / 60
        mean = sum(self.losses) / len(self.losses)
        print(
            f"{self.stage} {done}/{self.steps}  loss {mean:.5f}  {seconds:.3f} s/step  {minutes:.1f} min left",
            flush=True,
        )
        self.losses.clear()


# --------------------------------------------------------------------------------------------------------- autoencoder


def new_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(24, 24),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )


def train_autoencoder(work: Path, seed: int = 0, steps: int = 1500, batch: int = 64) -> None:
    """Reconstruction, with the latents drawn to the frame's own 2×2 pixel blocks, and a little noise on them.

    Latents that are close to space-to-depth keep the diffusion as easy as in pixels; the noise makes the decoder
    forgive a sampler's small errors.
    """
    torch.manual_seed(seed)
    scans, labels = digits("train")
    vae = new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    progress = Progress("autoencoder", 0, steps, every=100)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, steps, 2e-3, 1e-6, 50))
        generator = step_generator(seed, step)
        images = moving_digits(scans, labels, batch, generator, frames=1).frames[:, 0] * 2 - 1
        latents = vae.encode(images).latents
        noise = torch.randn(latents.shape, generator=generator) * 0.03
        decoded = vae.decode(latents + noise).sample
        loss = F.mse_loss(decoded, images) + 0.1 * F.mse_loss(latents, F.pixel_unshuffle(images, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.report(step, loss.item())
    normalise_latents(vae, seed)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def normalise_latents(vae: AutoencoderTiny, seed: int) -> None:
    """Sets `shift_factor` and `scaling_factor` so that (z − shift)·scale has mean 0 and standard deviation 0.5."""
    clips = moving_digits(*digits("train"), 256, step_generator(seed, 10**6))
    latents = vae.encode(clips.frames.flatten(0, 1) * 2 - 1).latents
    shift, scale = latents.mean().item(), LATENT_STD / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))


@torch.no_grad()
def encode(vae: AutoencoderTiny, frames: Tensor) -> Tensor:
    """Frames [N, F, 1, 32, 32] in [0, 1] → normalised latents [N, F, 4, 16, 16]."""
    latents = vae.encode(frames.flatten(0, 1) * 2 - 1).latents
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).unflatten(0, frames.shape[:2])


# ---------------------------------------------------------------------------------------------------------- classifier


def new_classifier() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[48, 96],
            depths=[2, 2],
            layer_type="basic",
            id2label={i: str(i) for i in range(10)},
            label2id={str(i): i for i in range(10)},
        )
    )


def train_classifier(work: Path, seed: int = 1, steps: int = 2000, batch: int = 64) -> None:
    """Cross-entropy over single frames in [−1, 1], with noise, a change of contrast and a little blur of the shape."""
    torch.manual_seed(seed)
    scans, labels = digits("train")
    model = new_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    progress = Progress("classifier", 0, steps, every=100)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, steps, 2e-3, 1e-6, 50))
        generator = step_generator(seed, step)
        clips = moving_digits(scans, labels, batch, generator, frames=1)
        frames = augment(clips.frames[:, 0], generator)
        loss = F.cross_entropy(model(pixel_values=frames * 2 - 1).logits, clips.labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.report(step, loss.item())
    model.eval()
    model.save_pretrained(work / "evaluator")
    print(f"classifier: {classifier_accuracy(model, seed):.4f} of frames of held-out digits read right", flush=True)


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """A small affine warp, contrast and noise, each drawn per frame [N, 1, 32, 32]."""
    count = len(frames)
    warp = torch.eye(2) + torch.randn(count, 2, 2, generator=generator) * 0.08
    theta = torch.cat([warp, torch.zeros(count, 2, 1)], dim=2)
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False)
    warped = F.grid_sample(frames, grid, align_corners=False)
    contrast = 0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(frames.shape, generator=generator) * 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    return (warped * contrast + noise).clamp(0, 1)


@torch.no_grad()
def classifier_accuracy(model: nn.Module, seed: int, count: int = 4000) -> float:
    """Share of `count` single frames of held-out digits, at random places, that the classifier reads right."""
    clips = moving_digits(*digits("held-out"), count, step_generator(seed, 10**6), frames=1)
    logits = model(pixel_values=clips.frames[:, 0] * 2 - 1).logits
    return (logits.argmax(-1) == clips.labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------------- diffusion


def new_unet(
    channels: tuple[int, ...] = (32, 64, 96), heads: tuple[int, ...] = (2, 4, 6)
) -> UNetSpatioTemporalConditionModel:
    attending = len(channels) - 1  # the finest level has residual blocks alone: two thirds of the time otherwise
    return UNetSpatioTemporalConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlockSpatioTemporal", *["CrossAttnDownBlockSpatioTemporal"] * attending),
        up_block_types=(*["CrossAttnUpBlockSpatioTemporal"] * attending, "UpBlockSpatioTemporal"),
        block_out_channels=channels,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=1,
        cross_attention_dim=64,
        num_attention_heads=heads,
        num_frames=FRAMES,
    )


def new_class_encoder() -> CLIPTextModel:
    """Ten digits and the null class, one token each, through one transformer layer: [B, 1] → [B, 1, 64]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=NULL_CLASS + 1,
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=1,
            bos_token_id=None,
            eos_token_id=NULL_CLASS,
            pad_token_id=None,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Squared cosine: its last step is noise to within 1e-4, so trailing steps start from what training ended with."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


class Denoiser(nn.Module):
    """UNet and class encoder as one module, so that one optimizer and one average cover both."""

    def __init__(self, unet: nn.Module, class_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.class_encoder = unet, class_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor, added_time_ids: Tensor) -> Tensor:
        context = self.class_encoder(input_ids=labels[:, None]).last_hidden_state
        velocity: Tensor = self.unet(noisy, timesteps, context, added_time_ids, return_dict=False)[0]
        return velocity


@dataclass(frozen=True)
class Batch:
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor
    added_time_ids: Tensor


def draw_batch(
    vae: AutoencoderTiny,
    data: tuple[Tensor, Tensor],
    parameters: Hyperparameters,
    step: int,
    share: slice = slice(None),
) -> Batch:
    """A process's share of everything random in a training step, from the seed and the step's number alone."""
    generator = step_generator(parameters.seed + 2, step)
    count = parameters.batch
    clips = moving_digits(*data, count, generator)
    evenly = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    shift = parameters.timestep_shift
    shifted = shift * evenly / (1 + (shift - 1) * evenly)
    dropped = torch.rand(count, generator=generator) < parameters.class_dropout
    ids = torch.stack([torch.full((count,), FPS), clips.motion_bucket_id, torch.zeros(count)], dim=1)
    noise = torch.randn(count, FRAMES, 4, SIZE // 2, SIZE // 2, generator=generator)
    return Batch(
        latents=encode(vae, clips.frames[share]),
        noise=noise[share],
        timesteps=(shifted * 1000).long().clamp(max=999)[share],
        labels=torch.where(dropped, NULL_CLASS, clips.labels)[share],
        added_time_ids=ids[share],
    )


def diffusion_loss(model: nn.Module, scheduler: DDIMScheduler, batch: Batch) -> Tensor:
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return F.mse_loss(model(noisy, batch.timesteps, batch.labels, batch.added_time_ids), target)


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average whose memory grows with the run: short at first, 1/(1 − decay) steps at last."""
    keep = min(decay, (1 + step) / (10 + step))
    for name, value in model.named_parameters():
        average[name].lerp_(value, 1 - keep)


def share_gradients(model: nn.Module, processes: int) -> None:
    """Replaces each process's gradients by their mean over all."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= processes
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train_in_process(rank: int, processes: int, rendezvous: str, options: argparse.Namespace) -> None:
    """One of several processes of one thread each: on a busy machine that is faster than threads in step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    run_diffusion(options, rank, processes)
    torch.distributed.destroy_process_group()


def run_diffusion(options: argparse.Namespace, rank: int = 0, processes: int = 1) -> None:
    parameters = Hyperparameters(steps=options.steps, timestep_shift=options.timestep_shift)
    train_diffusion(
        options.work,
        parameters,
        options.resume,
        options.compile,
        stop_after=options.stop_after,
        rank=rank,
        processes=processes,
    )


def diffusion_stage(options: argparse.Namespace) -> None:
    if options.processes == 1:
        run_diffusion(options)
        return
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (options.processes, f"file://{meeting}/point", options)
        torch.multiprocessing.spawn(train_in_process, arguments, nprocs=options.processes)


def train_diffusion(
    work: Path,
    parameters: Hyperparameters,
    resume: bool = False,
    compiled: bool = False,
    model: Denoiser | None = None,
    stop_after: int | None = None,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Trains to `work/diffusion.pt`: weights, their average, optimizer, step. `stop_after` ends early, resumably.

    With several `processes` each takes every n-th clip of a batch; all hold the same weights, and `rank` 0 saves.
    """
    torch.manual_seed(parameters.seed)
    vae = AutoencoderTiny.from_pretrained(work / "vae").eval()
    data, scheduler = digits("train"), new_scheduler()
    model = model or Denoiser(new_unet(), new_class_encoder())
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=parameters.weight_decay, betas=(0.9, 0.99))
    state_file, first = work / "diffusion.pt", 0
    if resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    forward = torch.compile(model) if compiled else model
    if rank == 0:
        print(f"diffusion from step {first}: {parameters}", flush=True)
    progress, saved = Progress("diffusion", first, parameters.steps), time.monotonic()
    share = slice(rank, None, processes)
    last = min(parameters.steps, stop_after or parameters.steps)
    for step in range(first, last):
        rate = learning_rate(
            step, parameters.steps, parameters.learning_rate, parameters.final_learning_rate, parameters.warmup
        )
        set_learning_rate(optimizer, rate)
        loss = diffusion_loss(forward, scheduler, draw_batch(vae, data, parameters, step, share))
        optimizer.zero_grad()
        loss.backward()
        if processes > 1:
            share_gradients(model, processes)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step, parameters.ema_decay)
        if rank:
            continue
        progress.report(step, loss.item())
        if step + 1 == last or time.monotonic() - saved > parameters.save_every_seconds:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
            }
            write_atomically(state_file, state)
            saved = time.monotonic()


# -------------------------------------------------------------------------------------------------------------- export


def averaged_model(work: Path) -> Denoiser:
    """The denoiser with the averaged weights of `work/diffusion.pt`."""
    model = Denoiser(new_unet(), new_class_encoder())
    average = torch.load(work / "diffusion.pt", weights_only=True)["average"]
    model.load_state_dict(average, strict=False)
    return model


def export(work: Path, folder: Path) -> None:
    """Writes the pipeline's folders, each whole or not at all, with float16 weights; other files in `folder` stay."""
    model = averaged_model(work)
    vae = AutoencoderTiny.from_pretrained(work / "vae")
    classifier = ResNetForImageClassification.from_pretrained(work / "evaluator")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        staging = Path(temporary)
        model.unet.half().save_pretrained(staging / "unet")
        model.class_encoder.half().save_pretrained(staging / "class_encoder")
        new_scheduler().save_pretrained(staging / "scheduler")
        save_evaluator(classifier, staging / "evaluator")
        vae.half().save_pretrained(staging / "vae")
        write_index(staging / "model_index.json")
        for item in sorted(staging.iterdir()):
            replace(item, folder / item.name)
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)


def replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def write_index(path: Path) -> None:
    index = {
        "_class_name": "ClassToVideoPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "class_encoder": ["transformers", "CLIPTextModel"],
        "num_classes": 10,
        "num_frames": FRAMES,
        "height": SIZE,
        "width": SIZE,
        "fps": FPS,
        "motion_bucket_id": 140.0,
    }
    write_json(path, index)


def save_evaluator(classifier: ResNetForImageClassification, folder: Path, clips: int = 2000) -> None:
    """The classifier, and what it and the consistency figure make of real clips of held-out digits."""
    classifier.half().save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5],
            "image_std": [0.5],
        },
    )
    real = moving_digits(*digits("held-out"), clips, step_generator(REFERENCE_SEED, 0))
    _, features = classify(load_classifier(folder), real.frames.flatten(0, 1) * 2 - 1)
    mean, covariance = feature_statistics(features)
    save_file({"mean": mean.float(), "covariance": covariance.float()}, folder / "reference.safetensors")
    consistency = round(temporal_consistency(real.frames).mean().item(), 4)
    reference = {"clips": clips, "frames_per_clip": FRAMES, "temporal_consistency_real": consistency}
    write_json(folder / "reference.json", reference)


# ------------------------------------------------------------------------------------------------------------ evaluate


def evaluate(folder: Path, clips: int, steps: int, guidance: float, processes: int) -> dict[str, object]:
    """The model card's figures, measured on the exported float16 weights computed in float32."""
    pipeline, evaluator = ClassToVideoPipeline.load(folder), Evaluator.load(folder)
    labels = torch.arange(clips) % 10
    start = time.monotonic()
    frames, speeds = generate_all(folder, labels, steps, guidance, processes)
    seconds = time.monotonic() - start
    real = moving_digits(*digits("train"), clips, step_generator(REFERENCE_SEED, 1))
    held_out = moving_digits(*digits("held-out"), clips, step_generator(REFERENCE_SEED, 2))
    return {
        "clips": clips,
        "steps": steps,
        "guidance_scale": guidance,
        "generated": rounded(evaluator.measure(frames, labels)),
        "frame_accuracy_by_digit": accuracy_by_digit(evaluator, frames, labels),
        "speed_correlation": round(torch.corrcoef(torch.stack([speeds, seen_speed(frames)]))[0, 1].item(), 4),
        "seconds": round(seconds, 1),
        "real_train": rounded(evaluator.measure(real.frames, real.labels)),
        "real_held_out": rounded(evaluator.measure(held_out.frames, held_out.labels)),
        "classifier_held_out_accuracy": round(classifier_accuracy(load_classifier(folder / "evaluator"), 1), 4),
        "autoencoder_psnr_held_out": round(autoencoder_psnr(pipeline.vae, held_out.frames), 2),
        "parameters": {name: parameters(getattr(pipeline, name)) for name in ("unet", "class_encoder", "vae")},
    }


@dataclass(frozen=True)
class Job:
    """A batch of clips to generate, all at one speed."""

    folder: Path
    labels: Tensor
    speed: float
    seed: int
    steps: int
    guidance: float


def generate(job: Job) -> Tensor:
    """The job's clips [N, F, 1, 32, 32]."""
    frames: Tensor = ClassToVideoPipeline.load(job.folder)(
        job.labels,
        seed=job.seed,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        motion_bucket_id=job.speed * MOTION_BUCKETS_PER_SPEED,
    ).frames
    return frames


def generate_all(
    folder: Path, labels: Tensor, steps: int, guidance: float, processes: int, batch: int = 10
) -> tuple[Tensor, Tensor]:
    """Clips [N, F, 1, 32, 32] and the speeds asked for [N]: one for each batch, evenly over the range of real clips."""
    parts = labels.split(batch)
    speeds = torch.linspace(*SPEEDS, len(parts))
    jobs = [
        Job(folder, part, speed, index * batch, steps, guidance)
        for index, (part, speed) in enumerate(zip(parts, speeds.tolist(), strict=True))
    ]
    threads = max(1, torch.get_num_threads() // processes)
    generated, start = [], time.monotonic()
    with torch.multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (threads,)) as pool:
        for frames in pool.imap(generate, jobs):
            generated.append(frames.clone())
            print(f"evaluate {len(generated)}/{len(jobs)} batches, {time.monotonic() - start:.0f} s", flush=True)
    return torch.cat(generated), speeds.repeat_interleave(batch)[: len(labels)]


def seen_speed(frames: Tensor) -> Tensor:
    """Median speed [N] of the object's centroid, in pixels per frame, which a single reflection leaves alone."""
    track = centroids((frames.mean(2) - 0.1).clamp(min=0))
    return track.diff(dim=1).norm(dim=-1).median(dim=1).values


def rounded(quality: Quality) -> dict[str, float]:
    return {name: round(value, 4) for name, value in quality.as_dict().items()}


def accuracy_by_digit(evaluator: Evaluator, frames: Tensor, labels: Tensor) -> list[float]:
    right = (evaluator.read(frames).labels == labels[:, None]).float().mean(1)
    return [round(right[labels == digit].mean().item(), 4) for digit in range(10)]


@torch.no_grad()
def autoencoder_psnr(vae: AutoencoderTiny, frames: Tensor) -> float:
    images = frames.flatten(0, 1)
    decoded = vae.decode(vae.encode(images * 2 - 1).latents).sample
    return psnr((decoded / 2 + 0.5).clamp(0, 1), images)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=["autoencoder", "classifier", "diffusion", "export", "evaluate", "all"])
    parser.add_argument("--work", type=Path, default=Path("moving-digits-training"), help="the stages' state")
    parser.add_argument("--folder", type=Path, default=HERE, help="the checkpoint's folder")
    parser.add_argument("--steps", type=int, default=Hyperparameters.steps, help="of the diffusion stage")
    parser.add_argument("--resume", action="store_true", help="continue the diffusion stage")
    parser.add_argument("--stop-after", type=int, help="end the diffusion stage early, resumably, at this step")
    parser.add_argument("--processes", type=int, default=1, help="of the diffusion and evaluate stages")
    parser.add_argument("--timestep-shift", type=float, default=Hyperparameters.timestep_shift, help="1: uniform")
    parser.add_argument("--compile", action="store_true", help="torch.compile the diffusion stage: a third faster")
    parser.add_argument("--clips", type=int, default=500, help="of the evaluate stage")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if options.stage == "all" else [options.stage]:
        STAGES[stage](options)


def write_evaluation(options: argparse.Namespace) -> None:
    found = evaluate(options.folder, options.clips, options.sampling_steps, options.guidance, options.processes)
    write_json(options.folder / "evaluation.json", found)
    print(json.dumps(found, indent=2))
    card = options.folder / "README.md"
    if card.exists():
        card.write_text(with_figures(card.read_text("utf-8"), found), encoding="utf-8")


def with_figures(card: str, found: dict[str, Any]) -> str:
    """The model card with its table of figures, between two marks, made anew."""
    kinds = {"generated": "generated", "real_held_out": "real, held-out digits", "real_train": "real, training digits"}
    rows = [f"{found['clips']} clips | frame accuracy | temporal consistency | Fréchet distance", "---|---:|---:|---:"]
    for kind, title in kinds.items():
        quality = found[kind]
        accuracy, consistency = quality["frame_accuracy"], quality["temporal_consistency"]
        rows.append(f"{title} | {accuracy:.1%} | {consistency:.3f} | {quality['frechet_distance']:.2f}")
    by_digit = ", ".join(f"{digit}: {share:.1%}" for digit, share in enumerate(found["frame_accuracy_by_digit"]))
    counts = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    facts = [
        f"Generated with {found['steps']} DDIM steps, guidance {found['guidance_scale']}, in {found['seconds']:.0f} s.",
        f"Frame accuracy by digit: {by_digit}.",
        f"Speed asked for by `motion_bucket_id` against the object's median speed: correlation "
        f"{found['speed_correlation']:.2f}.",
        f"The classifier reads {found['classifier_held_out_accuracy']:.1%} of 4,000 frames of held-out digits.",
        f"The autoencoder restores held-out clips at {found['autoencoder_psnr_held_out']:.1f} dB PSNR.",
        f"Parameters: {counts}.",
    ]
    table = "\n".join(f"| {row} |" if "---" not in row else f"|{row}|" for row in rows)
    before, rest = card.split(FIGURES[0])
    after = rest.split(FIGURES[1])[1]
    return f"{before}{FIGURES[0]}\n{table}\n\n" + "\n".join(f"- {fact}" for fact in facts) + f"\n{FIGURES[1]}{after}"


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "autoencoder": lambda options: train_autoencoder(options.work),
    "classifier": lambda options: train_classifier(options.work),
    "diffusion": diffusion_stage,
    "export": lambda options: export(options.work, options.folder),
    "evaluate": write_evaluation,
}


if __name__ == "__main__":
    main()
