"""Trains the `digits-vit` checkpoint: a deep, narrow vision transformer that reads handwritten digits, on CPU.

    python train.py train       12 layers on 1,437 scans, written beside this file in float16      (8 min of one core)
    python train.py distil      what is written, taught by moving-digits' classifier               (8 min of one core)
    python train.py evaluate    the accuracy of what is written → evaluation.json and the figures of README.md
    python train.py all         the three above

Data: the 1,797 scanned digits of scikit-learn (the test part of Alpaydın and Kaynak's *Optical Recognition of
Handwritten Digits*, UCI, 1998), in their original order, of which the last fifth is held out: the split of
`moving-digits`. Each is drawn bicubically at 32×32, so that a patch of 4×4 is about a pixel of the scan.

Sources: ViT, Dosovitskiy et al. 2021; a convolutional teacher, Touvron et al. 2021 (DeiT); mixup, Zhang et al. 2018;
an average of the weights, Polyak & Juditsky 1992.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetForImageClassification, ViTConfig, ViTForImageClassification

HERE = Path(__file__).resolve().parent
TEACHER = HERE.parent / "moving-digits" / "evaluator"
TEACHER_DIGIT = 15  # pixels of a scan in the frames that it reads
SIZE = 32
FIGURES = ("<!-- figures -->", "<!-- end of figures -->")
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


@dataclass(frozen=True)
class Hyperparameters:
    seed: int = 0
    steps: int = 1200
    batch: int = 48
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: int = 100
    weight_decay: float = 0.05
    average: float = 0.995
    label_smoothing: float = 0.1
    mixup: float = 0.1
    warp: float = 0.1
    taught: float = 0.0  # the teacher's share of the targets


DISTILLED = Hyperparameters(seed=1, steps=1000, learning_rate=5e-4, label_smoothing=0.0, taught=0.7)


def digits(part: str) -> tuple[Tensor, Tensor]:
    """Scans [N, 8, 8] in [0, 1] and labels [N] of `part`: "train" or "held-out"."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    cut = len(images) * 4 // 5
    chosen = slice(None, cut) if part == "train" else slice(cut, None)
    return images[chosen], labels[chosen]


def render(scans: Tensor, theta: Tensor | None = None) -> Tensor:
    """Draws scans [N, 8, 8] at 32×32 in [−1, 1]: [N, 1, 32, 32]; `theta` [N, 2, 3] moves and bends each."""
    if theta is None:
        theta = torch.eye(2, 3).repeat(len(scans), 1, 1)
    grid = F.affine_grid(theta, [len(scans), 1, SIZE, SIZE], align_corners=False)
    drawn = F.grid_sample(scans.unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 1) * 2 - 1


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def drawn_batch(
    data: tuple[Tensor, Tensor], parameters: Hyperparameters, step: int, teacher: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 32, 32] and class weights [B, 10] of a training step, from the seed and the step's number alone."""
    generator = step_generator(parameters.seed, step)
    count = parameters.batch
    chosen = torch.randint(len(data[0]), (count,), generator=generator)
    warp = torch.eye(2) + torch.randn(count, 2, 2, generator=generator) * parameters.warp
    shift = torch.randn(count, 2, 1, generator=generator) * 0.1
    theta = torch.cat([warp, shift], dim=2)
    images = render(data[0][chosen], theta)
    images = images + torch.randn(images.shape, generator=generator) * 0.1
    targets = F.one_hot(data[1][chosen], 10).float()
    if teacher is not None:
        with torch.no_grad():
            seen = teacher(pixel_values=render(data[0][chosen], theta * SIZE / TEACHER_DIGIT)).logits.softmax(-1)
        targets = targets.lerp(seen, parameters.taught)
    share = torch.rand(count, generator=generator).mul(parameters.mixup)[:, None]
    other = torch.randperm(count, generator=generator)
    images = images * (1 - share[..., None, None]) + images[other] * share[..., None, None]
    return images, targets * (1 - share) + targets[other] * share


class Drawn:
    """The training scans by number as they are drawn in training, without mixup: for `distill`, and others.

    An item is `pixel_values` [1, 32, 32] and its `target`. Each scan is drawn `times` times, moved and bent otherwise.
    """

    def __init__(self, times: int = 20, parameters: Hyperparameters = DISTILLED) -> None:
        self.data, self.times = digits("train"), times
        self.parameters = dataclasses.replace(parameters, batch=1, mixup=0.0)

    def __len__(self) -> int:
        return len(self.data[0]) * self.times

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        scan = number % len(self.data[0])
        one = self.data[0][scan : scan + 1], self.data[1][scan : scan + 1]
        images, _ = drawn_batch(one, self.parameters, number)
        return {"pixel_values": images[0], "target": one[1][0]}


def load_teacher() -> nn.Module:
    """The classifier of moving-digits, which never saw the held-out scans either."""
    return ResNetForImageClassification.from_pretrained(TEACHER, dtype=torch.float32).eval()


def new_model() -> ViTForImageClassification:
    """12 layers of 96 channels and 3 heads; 64 patches and the class token."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=4,
            num_channels=1,
            hidden_size=96,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=192,
            initializer_range=0.08,  # about 1 / √96: the usual 0.02 is for 768 channels, and learns nothing here
            id2label={i: str(i) for i in range(10)},
            label2id={str(i): i for i in range(10)},
        )
    )


def learning_rate(step: int, parameters: Hyperparameters) -> float:
    """Linear warm-up, then half a cosine."""
    if step < parameters.warmup:
        return parameters.learning_rate * (step + 1) / parameters.warmup
    progress = (step - parameters.warmup) / max(1, parameters.steps - parameters.warmup)
    span = parameters.learning_rate - parameters.final_learning_rate
    return parameters.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    """Share of the scans of `part` that are read right."""
    scans, labels = digits(part)
    logits = torch.cat([model(pixel_values=render(some)).logits for some in scans.split(120)])
    return (logits.argmax(-1) == labels).float().mean().item()


def train(model: nn.Module, parameters: Hyperparameters, teacher: nn.Module | None = None) -> nn.Module:
    """The average of the weights over the last few hundred steps."""
    data = digits("train")
    model.train()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=parameters.weight_decay)
    start = time.monotonic()
    for step in range(parameters.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, parameters)
        images, targets = drawn_batch(data, parameters, step, teacher)
        logits = model(pixel_values=images).logits
        loss = F.cross_entropy(logits, targets, label_smoothing=parameters.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kept = min(parameters.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - kept)
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - start) / (step + 1)
            print(f"{step + 1}/{parameters.steps}  loss {loss.item():.4f}  {seconds:.3f} s/step", flush=True)
    return average


def write(model: ViTForImageClassification, folder: Path) -> None:
    """`folder` in the layout of a transformers model, weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = "float16"
    model.config.architectures = ["ViTForImageClassification"]
    model.config.save_pretrained(folder)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def load(folder: Path) -> ViTForImageClassification:
    """What :func:`write` left, computing in float32."""
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train_stage(options: argparse.Namespace) -> None:
    parameters = Hyperparameters()
    torch.manual_seed(parameters.seed)
    write(train(new_model(), parameters), options.folder)


def distil_stage(options: argparse.Namespace) -> None:
    write(train(load(options.folder), DISTILLED, load_teacher()), options.folder)


def evaluate_stage(options: argparse.Namespace) -> None:
    model = load(options.folder)
    found = {
        "held_out_accuracy": round(accuracy(model, "held-out"), 4),
        "train_accuracy": round(accuracy(model, "train"), 4),
        "held_out_scans": len(digits("held-out")[0]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    write_json(options.folder / "evaluation.json", found)
    print(json.dumps(found, indent=2))
    card = options.folder / "README.md"
    if card.exists():
        card.write_text(with_figures(card.read_text("utf-8"), found), encoding="utf-8")


def with_figures(card: str, found: dict[str, Any]) -> str:
    """The model card with its list of figures, between two marks, made anew."""
    facts = [
        f"Held-out accuracy {found['held_out_accuracy']:.2%} of {found['held_out_scans']} scans; "
        f"of the scans it was trained on {found['train_accuracy']:.2%}.",
        f"Parameters: {found['parameters']:,}.",
    ]
    before, rest = card.split(FIGURES[0])
    after = rest.split(FIGURES[1])[1]
    return f"{before}{FIGURES[0]}\n" + "\n".join(f"- {fact}" for fact in facts) + f"\n{FIGURES[1]}{after}"


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": train_stage,
    "distil": distil_stage,
    "evaluate": evaluate_stage,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--folder", type=Path, default=HERE, help="where the checkpoint is")
    options = parser.parse_args()
    for stage in STAGES if options.stage == "all" else [options.stage]:
        STAGES[stage](options)


if __name__ == "__main__":
    main()
