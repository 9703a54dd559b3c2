"""A discriminator on the features of a frozen denoiser, and a student that is trained against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optpass.errors import nearest_paths
from optpass.ir.graph import operators, path_of, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import WeightStore
from optpass.pipeline.target import Runner
from optpass.rewrite.probes import matching, probes
from optpass.rewrite.splitting import subgraph
from optpass.training.courses import Lesson
from optpass.training.denoising import Denoising, pseudo_huber
from optpass.training.networks import Network, Values
from optpass.training.objective import Objective, share_gradients

WIDTH, GROUPS = 64, 8


class Discriminator(nn.Module):
    """Logits of a sample at a timestep, one for each place of each feature, by heads on a frozen ``encoder``.

    A feature [N·F, C, H, W] of F frames has a head of 3×3 convolutions over space and one of 3 over time; without
    frames the first alone. One of tokens, [N, L, C], has a head of 3 over the tokens.

    Source: SF-V, arXiv 2406.04324, section 3.3: spatial and temporal heads on the frozen encoder of the UNet. What the
    heads are made of is not published.
    """

    def __init__(self, encoder: Network, shapes: Mapping[str, Sequence[int]], rows: int) -> None:
        super().__init__()
        self._run = encoder.runner(gradients=True)
        self._frames = {name: shape[0] // rows for name, shape in shapes.items()}
        self.heads = nn.ModuleDict()
        for index, (name, shape) in enumerate(shapes.items()):
            for kind in self._kinds(name, shape):
                self.heads[f"{index}:{kind}"] = _head(kind, shape[1] if len(shape) == 4 else shape[2])
        self._names = tuple(shapes)

    def _kinds(self, name: str, shape: Sequence[int]) -> tuple[str, ...]:
        if len(shape) == 3:
            return ("tokens",)
        return ("space", "time") if self._frames[name] > 1 else ("space",)

    def features(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What the encoder makes of a call."""
        found = self._run(inputs)
        return [found[name] for name in self._names]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits, of one head after the other."""
        return [head(self._seen(key, features)).flatten() for key, head in self.heads.items()]

    def _seen(self, key: str, features: Sequence[Tensor]) -> Tensor:
        number, _, kind = key.partition(":")
        value = features[int(number)]
        if kind == "tokens":
            return value.transpose(1, 2)
        if kind == "time":
            frames = self._frames[self._names[int(number)]]
            return value.reshape(-1, frames, *value.shape[1:]).transpose(1, 2)
        return value


def _head(kind: str, channels: int) -> nn.Module:
    layer = {"space": nn.Conv2d, "time": nn.Conv3d, "tokens": nn.Conv1d}[kind]
    kernel: Any = {"space": 3, "time": (3, 1, 1), "tokens": 3}[kind]
    layers: list[nn.Module] = []
    for width in (channels, WIDTH):
        layers += [layer(width, WIDTH, kernel, padding="same"), nn.GroupNorm(GROUPS, WIDTH), nn.SiLU()]
    return nn.Sequential(*layers, layer(WIDTH, 1, 1))


def discriminator_for(program: Program, patterns: Sequence[str], values: Values, *, seed: int) -> Discriminator:
    """Heads on the modules of ``program``, of one entry, that match ``patterns``; nothing behind them is computed.

    Raises:
        ValueError: none matches, or none gives images or tokens.
    """
    (name, graph), *_ = program.entries.items()

    looked_at = probes(graph, matching(patterns))
    found = {path: probe.node for path, probe in looked_at.items() if len(shape_of(probe.node)) in (3, 4)}
    if not found:
        paths = {path_of(node) for node in operators(graph)}
        raise ValueError(
            f"no module with images or tokens matches {', '.join(patterns)}{nearest_paths(patterns[0], paths)}"
        )
    encoder = subgraph(graph, inputs={}, outputs=found)
    read = WeightStore({weight: program.weights[weight] for weight in encoder.weight_names})
    frozen = Network(replace(program, entries={name: encoder}, weights=read, loop=None), values)
    rows = int(graph.inputs_at()[0].shape[0])
    shapes = {spec.name: tuple(int(size) for size in spec.shape) for spec in encoder.outputs}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Discriminator(frozen, shapes, rows)


@dataclass
class Adversarial(Objective):
    """Samples that the discriminator takes for given ones, at every noise; and the given one, by ``reconstruction``.

    Half of the lessons start from noise, as the sampler does; the others from the given sample, noised to one of four
    timesteps, evenly spaced. The discriminator sees both samples noised to timesteps whose logit is normal with mean
    and deviation ``noise``; hinge losses, and R1 on the features of the given ones.

    Source: SF-V, arXiv 2406.04324, section 3: T_g = 4, a generator's loss of the adversarial one and 0.1 times a
    pseudo-Huber; MoViE, arXiv 2412.06578, algorithm 2, for the noise. R1 is on the features and not on the sample,
    which would take second derivatives of the encoder. AdamW stands for SM3.
    """

    denoising: Denoising
    discriminator: Discriminator
    rate: float
    noise: tuple[float, float]
    reconstruction: float
    penalty: float
    levels: int = 4

    def __post_init__(self) -> None:
        self._optimiser = torch.optim.AdamW(
            self.discriminator.parameters(), lr=self.rate, betas=(0.5, 0.99), weight_decay=0.0
        )
        self._defaults = {k: torch.tensor(v) for k, v in self.denoising.loop.signature.defaults.items()}
        self._losses: list[float] = []

    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        given = self.denoising.given(lesson)
        made = self._sample(lesson, learn)
        timestep = self._timestep()
        real = [value.detach() for value in self._features(lesson, given, timestep)]
        found = self._features(lesson, made, timestep)
        self._learn(real, [value.detach() for value in found])
        # The heads learn from their own loss alone.
        self.discriminator.requires_grad_(False)
        try:
            logits = self.discriminator(found)
        finally:
            self.discriminator.requires_grad_(True)
        terms = {"adversarial": -torch.stack([each.mean() for each in logits]).mean()}
        if self.reconstruction:
            terms["reconstruction"] = self.reconstruction * pseudo_huber(made, given)
        return terms

    def _sample(self, lesson: Lesson, learn: Runner) -> Tensor:
        made, steps = self.denoising, self.denoising.diffusion.timesteps
        if float(torch.rand(())) < 0.5:
            return made.generated(learn, lesson, int(torch.randint(len(steps), ())))[0]
        place = int(torch.randint(self.levels, ()))
        timestep = torch.tensor([round(steps[0] * (1 - place / self.levels))])
        clean = made.given(lesson)
        return made.clean(learn, lesson, made.diffusion.noised(clean, torch.randn_like(clean), timestep), timestep)

    def _timestep(self) -> Tensor:
        mean, deviation = self.noise
        share = torch.sigmoid(torch.randn(1) * deviation + mean)
        return (share * (self.denoising.diffusion.count - 1)).long()

    def _features(self, lesson: Lesson, clean: Tensor, timestep: Tensor) -> list[Tensor]:
        noisy = self.denoising.diffusion.noised(clean, torch.randn_like(clean), timestep)
        return self.discriminator.features({**self._defaults, **self.denoising.inputs(lesson, noisy, timestep)})

    def _learn(self, real: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """The gradients of the heads."""
        watched = [value.requires_grad_(self.penalty > 0) for value in real]
        one, other = self.discriminator(watched), self.discriminator(found)
        losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(one, other, strict=True)]
        loss = torch.stack(losses).mean()
        self._losses.append(float(loss.detach()))
        if self.penalty:
            total = torch.stack([logits.sum() for logits in one]).sum()
            slopes = torch.autograd.grad(total, watched, create_graph=True)
            loss = loss + self.penalty * torch.stack([slope.square().sum() for slope in slopes]).mean()
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, update: int, lessons: int) -> dict[str, float]:
        share_gradients(self.discriminator.parameters(), lessons)
        self._optimiser.step()
        self._optimiser.zero_grad()
        told, self._losses = sum(self._losses) / len(self._losses), []
        return {"discriminator": told}

    def state(self) -> dict[str, Any]:
        return {"heads": self.discriminator.state_dict(), "optimiser": self._optimiser.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.discriminator.load_state_dict(state["heads"])
        self._optimiser.load_state_dict(state["optimiser"])
