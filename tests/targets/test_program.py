"""The program target: saved Programs, and folders that from_pretrained loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from optpass.capture.sources import capture
from optpass.errors import MissingValuesError, UserError
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.evaluate.trials import random_inputs
from optpass.interchange.storage import load_program
from optpass.ir.program import Program
from optpass.ir.text import graph_text
from optpass.ir.weights import Cast, Constant, Scale, Select
from optpass.pipeline.target import Lowering
from optpass.targets.program import ProgramTarget
from optpass.testing import randomised


def lower(program: Program, folder: Path, layout: str) -> Any:
    folder.mkdir(exist_ok=True)
    return ProgramTarget.of("program", {"layout": layout}).lower(program, Lowering(folder))["full"]


def halved(program: Program) -> Program:
    """Other values under the same names and shapes, in fp16, as a merge and a cast leave them.

    Only the weights change dtype, so this Program is for writing, not for running.
    """
    return program.with_weights(
        {name: Cast(Scale(expression, 0.5), torch.float16) for name, expression in program.weights.items()}
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    randomised(ViTForImageClassification(config).eval()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    DDPMPipeline(randomised(unet.eval()), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet(pipeline: Path) -> Program:
    return capture(str(pipeline), inputs={"sample": (1, 3, 8, 8)})


@pytest.fixture(scope="module")
def classifier(vit: Path) -> Program:
    return capture(str(vit))


def test_a_program_is_saved_and_runs_again(unet: Program, tmp_path: Path) -> None:
    entry = lower(unet, tmp_path, "program")
    loaded = load_program((tmp_path / entry.main).parent)
    assert graph_text(loaded.entries["full"]) == graph_text(unet.entries["full"])
    run = ProgramTarget.load(tmp_path, {"engine": entry.main, "details": entry.details}, {})
    inputs = random_inputs(unet.entries["full"].inputs_at(), unet.ranges, seed=0)
    difference = outputs_difference(program_runner(unet, "full")(inputs), run(inputs))
    assert difference.relative_error < 1e-6


def test_a_pipeline_folder_is_loaded_by_diffusers(unet: Program, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    changed = halved(unet)
    entry = lower(changed, tmp_path / "out", "diffusers")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    state = pipe.unet.state_dict()
    assert set(state) == set(changed.used_weights())
    for name, expression in changed.used_weights().items():
        assert torch.equal(state[name], expression.evaluate())
    assert pipe.scheduler.config.num_train_timesteps == 50
    assert entry.details["components"] == "."
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_a_transformers_folder_is_loaded_by_transformers(classifier: Program, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    changed = halved(classifier)
    lower(changed, tmp_path / "out", "transformers")
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    state = model.state_dict()
    for name, expression in changed.used_weights().items():
        assert torch.equal(state[name], expression.evaluate())


def test_the_folder_is_still_a_program(unet: Program, tmp_path: Path) -> None:
    entry = lower(unet, tmp_path / "out", "diffusers")
    loaded = load_program((tmp_path / "out" / entry.main).parent)
    assert graph_text(loaded.entries["full"]) == graph_text(unet.entries["full"])
    assert loaded.origin.pipeline
    assert len(load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")) == len(loaded.weights)


def test_weights_that_passes_changed_are_named(unet: Program, tmp_path: Path) -> None:
    narrow = Select(unet.weights["conv_out.weight"], 0, (0, 1))
    with pytest.raises(UserError, match=r"conv_out\.weight is \[2, 8, 3, 3\] where the config says \[3, 8, 3, 3\]"):
        lower(unet.with_weights({"conv_out.weight": narrow}), tmp_path, "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_gone_or_new_are_named(unet: Program, tmp_path: Path) -> None:
    program = unet.copy()
    graph = program.entries["full"]
    node = next(n for n in graph.fx.nodes if n.op == "get_attr" and n.target == "conv_out.bias")
    node.target = "folded.bias"
    program = program.with_weights({"folded.bias": Constant(torch.zeros(3))})
    with pytest.raises(UserError, match=r"folded\.bias is new; conv_out\.bias is gone. Use layout: program"):
        lower(program, tmp_path, "diffusers")


def test_a_checkpoint_of_another_library_is_refused(classifier: Program, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a checkpoint of that library"):
        lower(classifier, tmp_path, "diffusers")


def test_a_class_name_reaches_only_the_librarys_models(unet: Program, tmp_path: Path) -> None:
    forged = replace(unet, origin=replace(unet.origin, class_name="DiffusionPipeline"))
    with pytest.raises(UserError, match="no model class 'DiffusionPipeline'"):
        lower(forged, tmp_path, "diffusers")


def test_a_structure_only_program_is_saved_but_is_no_folder(pipeline: Path, tmp_path: Path) -> None:
    program = capture(str(pipeline), inputs={"sample": (1, 3, 8, 8)}, structure_only=True)
    entry = lower(program, tmp_path / "a", "program")
    assert not load_program((tmp_path / "a" / entry.main).parent).has_values
    with pytest.raises(MissingValuesError, match="structure-only"):
        lower(program, tmp_path / "b", "diffusers")
