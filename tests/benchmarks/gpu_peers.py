"""Contestants in PyTorch itself: eager, `torch.compile`, DeepCache and cache-dit, on the calls that the engines get.

Loaders of :mod:`optpass.evaluate.bench_worker`. Tensors come from the CPU and go back there, as those of engines do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.bench_worker import Ready
from optpass.evaluate.difference import program_calls
from optpass.evaluate.walks import walk
from optpass.ir.program import Program

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def eager(folder: str, device: str, precision: str, inputs: Mapping[str, Any], every: int = 1) -> Ready:
    """The model as diffusers has it."""
    return _ready(_model(folder, device, precision), folder, device, inputs, every)


def compiled(folder: str, device: str, precision: str, inputs: Mapping[str, Any], every: int = 1) -> Ready:
    """`torch.compile`, one graph or none."""
    model = _model(folder, device, precision)
    model.forward = torch.compile(model.forward, fullgraph=True)
    return _ready(model, folder, device, inputs, every)


def deepcache(folder: str, device: str, precision: str, inputs: Mapping[str, Any], every: int, branch: int) -> Ready:
    """DeepCache's hooks, which find the step by the timestep's place among the scheduler's."""
    from DeepCache import DeepCacheSDHelper

    model = _model(folder, device, precision)
    ready = _ready(model, folder, device, inputs, every)
    scheduler = SimpleNamespace(timesteps=ready.facts["timesteps"])
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=scheduler))
    helper.set_params(cache_interval=every, cache_branch_id=branch)
    helper.enable()
    return ready


def cache_dit(folder: str, device: str, precision: str, inputs: Mapping[str, Any], every: int) -> Ready:
    """cache-dit's dual-block cache behind one computed block, told to reuse as often as it may."""
    import cache_dit as library

    model = _model(folder, device, precision)
    forward, blocks = library.ForwardPattern.Pattern_1, [model.transformer_blocks, model.single_transformer_blocks]
    library.enable_cache(
        library.BlockAdapter(transformer=model, blocks=blocks, forward_pattern=[forward, forward]),
        cache_config=library.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            max_continuous_cached_steps=every - 1,
            residual_diff_threshold=1e9,
        ),
    )
    return _ready(model, folder, device, inputs, every)


def _model(folder: str, device: str, precision: str) -> Any:
    """The denoiser with its weights, computing in ``precision`` on ``device``."""
    import diffusers

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    name = json.loads((Path(folder) / "config.json").read_text("utf-8"))["_class_name"]
    model = getattr(diffusers, name).from_pretrained(folder, torch_dtype=PRECISIONS[precision]).eval().to(device)
    if precision == "int8":
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError:
            raise UserError("int8 in eager PyTorch is torchao's: pip install torchao") from None
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _ready(model: nn.Module, folder: str, device: str, inputs: Mapping[str, Any], every: int) -> Ready:
    """``model`` on a walk of ``every`` steps, called as the captured one was."""
    sizes = {name: tuple(shape) for name, shape in inputs.items()}
    program = capture(folder, inputs=sizes, structure_only=True, dtype=torch.float32)
    loop, graph = program.loop, program.entries["full"]
    assert loop is not None
    call = next(iter(program_calls(program).values()))
    steps = walk(loop, call.inputs_at(), program.ranges, 0, every)
    dtype = next(model.parameters()).dtype

    def run() -> None:
        with torch.no_grad():
            for tensors in steps:
                given = {name: _moved(value, device, dtype) for name, value in tensors.items()}
                arguments = graph.signature.arguments.unflatten(given)
                first, second, *_ = graph.signature.parameters
                positional = [arguments.pop(name) for name in (first, second) if loop.timestep == second]
                model(*positional, **arguments, return_dict=False)[0].float().cpu()

    timesteps = [float(tensors[loop.timestep].reshape(-1)[0]) for tensors in steps]
    return Ready(run, calls=every, items=_items(program), facts={"device": device, "timesteps": timesteps})


def _items(program: Program) -> int:
    return next((spec.shape[0] for spec in program.entries["full"].inputs_at() if len(spec.shape) > 1), 1)


def _moved(value: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() and value.dim() > 0 else None)
