"""What tests of passes need: a small module captured together with its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant


def capture_module(build: Callable[[], nn.Module], **inputs: Tensor) -> tuple[Program, nn.Module]:
    """The module that ``build`` makes, twice: captured with random weights, and real with the same ones.

    ``inputs`` are example arguments by name, of which shape and dtype count.
    """
    torch.manual_seed(0)
    real = randomised(build().eval())
    fake, mode = build_fake(build)
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    return export_program(fake, mode, inputs, weights, Origin("test")), real


def randomised(module: nn.Module) -> nn.Module:
    """Every saved floating parameter and buffer away from zero and one, where a wrong pass could hide."""
    generator, saved = torch.Generator().manual_seed(1), module.state_dict()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name not in saved or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim <= 1:
                tensor.copy_(noise * 0.3 + 0.4)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return module
