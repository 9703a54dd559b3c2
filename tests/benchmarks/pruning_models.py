"""Small models pruned by both, at the same criterion and the same MACs: errors of the output, and ONNX Runtime's time.

What the peer left is exported by PyTorch and captured like any exported program, so that both go through one cost
analysis and one target.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.capture.timm_import import timm_importable
from optpass.evaluate.difference import program_runner
from optpass.evaluate.importance import sampled_calls
from optpass.evaluate.latency import Comparison, compare_latency
from optpass.evaluate.quality import load_classifier
from optpass.ir.program import Program
from optpass.ir.weights import Constant
from optpass.passes.prune_channels import PruneChannels
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.target import Lowering, Runner
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import randomised

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "moving-digits"
CALLS = 8
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """An eager model, example inputs, the layer whose outputs stay, and the calls that errors are measured on."""

    name: str
    weights: str
    module: nn.Module
    inputs: Inputs
    last: str
    calls: list[Inputs]


@dataclass(frozen=True)
class Outcome:
    """One model at one ratio.

    MACs are shares of the original's; errors relative L2 of the output. ``ours`` was given the peer's share as its
    budget, or the same ratio where that leaves no more; ``even`` is ours at the same ratio. ``latency`` has the peer
    first.
    """

    model: str
    weights: str
    ratio: float
    macs: float
    error: float
    ours_macs: float
    ours_error: float
    even_macs: float
    even_error: float
    latency: Comparison | None
    refused: str = ""


def models() -> Iterator[Model]:
    """Two with random weights, two trained ones."""
    from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{"sample_size": 32, "block_out_channels": (128, 256), "layers_per_block": 1, "attention_head_dim": 4},
        **{"cross_attention_dim": 64, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    shapes = {"sample": (1, 4, 32, 32), "timestep": (1,), "encoder_hidden_states": (1, 7, 64)}
    calls = [_normal(shapes, seed) for seed in range(CALLS)]
    yield Model("UNet2DConditionModel, 2 levels", "random", randomised(unet.eval()), calls[0], "conv_out", calls)
    calls = [_normal({"x": (1, 3, 224, 224)}, seed) for seed in range(CALLS)]
    with timm_importable():
        import timm

        resnet = randomised(timm.create_model("resnet50").eval())
    yield Model("ResNet-50", "random", resnet, calls[0], "fc", calls)
    calls = [_normal({"pixel_values": (8, 1, 32, 32)}, seed) for seed in range(CALLS)]
    classifier = load_classifier(CHECKPOINT / "evaluator")
    yield Model("moving-digits' evaluator", "trained", classifier, calls[0], "classifier.1", calls)
    denoiser = UNetSpatioTemporalConditionModel.from_pretrained(CHECKPOINT, subfolder="unet", torch_dtype=torch.float32)
    program = capture(CHECKPOINT, inputs={"sample": (2, 8, 4, 16, 16)}, dtype=torch.float32)
    [calls] = sampled_calls(program, build_pipeline(CHECKPOINT, {}), Asked(steps=CALLS), CALLS).values()
    yield Model("moving-digits' UNet", "trained", denoiser.eval(), calls[0], "conv_out", calls)


def _normal(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compare(model: Model, ratio: float) -> Outcome:
    """Both on one model."""
    from pruning_peers import prune

    program = exported(model.module, model.inputs)
    inputs = {**model.inputs, **({"return_dict": False} if hasattr(model.module, "config") else {})}
    whole = measure(program).totals.macs
    even = _pruned(program, ratio=ratio)
    facts = {"even_macs": measure(even).totals.macs / whole, "even_error": _error(program, even, model)}
    try:
        theirs = exported(prune(copy.deepcopy(model.module), inputs, model.last, ratio), model.inputs)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Outcome(model.name, model.weights, ratio, 1, 0, 1, 0, **facts, latency=None, refused=said)
    share = measure(theirs).totals.macs / whole
    # The same ratio where it leaves no more than the peer has, as it does where nothing rounds.
    ours = even if facts["even_macs"] <= share else _pruned(program, macs=share)
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as home:
        engines = [(name, engine(each, Path(home, name))) for name, each in (("peer", theirs), ("optpass", ours))]
        latency = compare_latency(*engines, [_tensors(program, model.inputs)])
    return Outcome(
        *(model.name, model.weights, ratio, share, _error(program, theirs, model)),
        *(measure(ours).totals.macs / whole, _error(program, ours, model)),
        **facts,
        latency=latency,
    )


def exported(module: nn.Module, inputs: Inputs) -> Program:
    """A module's Program with its weights, by way of a file of ``torch.export``."""
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as home, torch.no_grad():
        path = Path(home, "model.pt2")
        torch.export.save(torch.export.export(_Tuple(module), (), {"inputs": dict(inputs)}, strict=False), path)
        program = capture(path)
        # The file goes with this call.
        return program.with_weights({name: Constant(e.evaluate().clone()) for name, e in program.weights.items()})


class _Tuple(nn.Module):
    """A model of any library, its first output alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Inputs) -> Tensor:
        output = self.module(**inputs)
        return output if isinstance(output, Tensor) else output[0]


def _pruned(program: Program, **amount: float) -> Program:
    after, _ = run_pass(program, Step("prune-channels", PruneChannels(**amount)))
    return after


def _tensors(program: Program, inputs: Inputs) -> dict[str, Tensor]:
    specs = program.entries["full"].inputs
    return {spec.name: inputs[spec.name.rpartition(".")[2]] for spec in specs}


def _error(before: Program, after: Program, model: Model) -> float:
    """Relative L2 over all calls together."""
    runners: list[Runner] = [program_runner(each, "full") for each in (before, after)]
    gap = size = 0.0
    for call in model.calls:
        (a,), (b,) = (runner(_tensors(before, call)).values() for runner in runners)
        gap, size = gap + float((a - b).square().sum()), size + float(a.square().sum())
    return (gap / size) ** 0.5


def engine(program: Program, folder: Path) -> Runner:
    """ONNX Runtime's of the whole Program, on one thread."""
    folder.mkdir()
    entry = OnnxRuntime(threads=1).lower(program, Lowering(folder))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
    return OnnxRuntime.load(folder, record, {"threads": 1})
