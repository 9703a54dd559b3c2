"""Trains a LoRA that teaches `moving-digits` a new motion, falling straight down; minutes on 2 CPU cores.

    python train.py train      the adapter beside this file, in peft's layout, float16
    python train.py evaluate   60 clips with and without it → evaluation.json

What a step draws depends on the seed and the step's number alone: two runs on one machine give one adapter.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); the model, its data and its loss are those of `../moving-digits`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderTiny, UNetSpatioTemporalConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from optpass.evaluate.quality import Evaluator, centroids
from optpass.runtime.class_to_video import ClassToVideoPipeline

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "moving-digits"
WEIGHTS = "adapter_model.safetensors"
RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_in"]
DOWNWARD = 0.8
"""A clip falls when this share of its motion's length points down, the frames of one reflection left out."""


def base_module() -> ModuleType:
    """The script that trained the checkpoint, for its data and its loss."""
    spec = importlib.util.spec_from_file_location("moving_digits_train", BASE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


base = base_module()


def falling_digits(scans: Tensor, labels: Tensor, count: int, generator: torch.Generator, frames: int) -> object:
    """Clips of one scan each that falls at constant speed and comes in again at the top."""
    chosen = torch.randint(len(scans), (count,), generator=generator)
    room = base.SIZE - base.DIGIT_SIZE
    start = torch.rand(count, 1, 2, generator=generator) * room
    speed = base.SPEEDS[0] + torch.rand(count, generator=generator) * (base.SPEEDS[1] - base.SPEEDS[0])
    down = torch.stack([torch.zeros(count), speed], dim=-1)
    path = start + down[:, None, :] * torch.arange(frames)[None, :, None]
    height = base.SIZE + base.DIGIT_SIZE
    corners = torch.stack([path[..., 0], (path[..., 1] + base.DIGIT_SIZE) % height - base.DIGIT_SIZE], dim=-1)
    return base.Clips(
        base.render(scans[chosen], corners), labels[chosen], (speed * base.MOTION_BUCKETS_PER_SPEED).round()
    )


def train(folder: Path, steps: int, batch: int, seed: int) -> None:
    """The diffusion loss of the checkpoint's own training, on falling digits, over the adapter's factors alone."""
    torch.manual_seed(seed)
    base.moving_digits = lambda scans, labels, count, generator, frames=base.FRAMES: falling_digits(
        scans, labels, count, generator, frames
    )
    options = {"torch_dtype": torch.float32}
    vae = AutoencoderTiny.from_pretrained(BASE / "vae", **options).eval()
    encoder = CLIPTextModel.from_pretrained(BASE / "class_encoder", dtype=torch.float32).eval()
    unet = UNetSpatioTemporalConditionModel.from_pretrained(BASE / "unet", **options)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=True)
    adapted: PeftModel = get_peft_model(unet, config)
    model = base.Denoiser(adapted, encoder.requires_grad_(False))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    data, scheduler = base.digits("train"), base.new_scheduler()
    parameters = base.Hyperparameters(seed=seed, steps=steps, batch=batch)
    progress = base.Progress("falling", 0, steps, every=20)
    for step in range(steps):
        base.set_learning_rate(optimizer, base.learning_rate(step, steps, 4e-3, 1e-5, 10))
        loss = base.diffusion_loss(model, scheduler, base.draw_batch(vae, data, parameters, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        progress.report(step, loss.item())
    save(adapted, folder)


def save(adapted: PeftModel, folder: Path) -> None:
    """peft's two files in `folder`, the factors in float16, without the machine's paths."""
    with tempfile.TemporaryDirectory() as temporary:
        adapted.save_pretrained(temporary)
        config = json.loads(Path(temporary, "adapter_config.json").read_text("utf-8"))
        tensors = {name: value.half().contiguous() for name, value in load_file(Path(temporary, WEIGHTS)).items()}
    config |= {"base_model_name_or_path": "moving-digits", "target_modules": sorted(config["target_modules"])}
    base.write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def downward(frames: Tensor) -> Tensor:
    """For each clip [N, F, 1, H, W] the share of its centroid's way that points down, from −1 to 1."""
    steps = centroids((frames.mean(2) - 0.1).clamp(min=0)).diff(dim=1)
    # One step of a clip may be the digit's return at the other edge; the middle of the others is the motion.
    down = steps.median(dim=1).values[:, 1]
    return down / steps.norm(dim=-1).median(dim=1).values.clamp(min=1e-6)


def evaluate(folder: Path, clips: int) -> dict[str, object]:
    """Do the digits fall, and do they still read right; without and with the adapter."""
    labels, evaluator = torch.arange(clips) % 10, Evaluator.load(BASE)
    found: dict[str, object] = {"clips": clips}
    pipeline = ClassToVideoPipeline.load(BASE)
    for kind in ("without", "with"):
        if kind == "with":
            pipeline.unet = PeftModel.from_pretrained(pipeline.unet, folder).eval()
        frames = pipeline(labels, seed=0).frames
        found[kind] = {
            "falling": round((downward(frames) > DOWNWARD).float().mean().item(), 4),
            "frame_accuracy": round(evaluator.measure(frames, labels).frame_accuracy, 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=["train", "evaluate"])
    parser.add_argument("--folder", type=Path, default=HERE, help="where the adapter's files lie")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=60)
    options = parser.parse_args()
    if options.stage == "train":
        return train(options.folder, options.steps, options.batch, options.seed)
    found = evaluate(options.folder, options.clips)
    base.write_json(options.folder / "evaluation.json", found)
    return print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
