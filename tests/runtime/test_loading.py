"""From a bundle on disk to a module, and in place of a pipeline's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optpass
from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.ir.program import Program
from optpass.pipeline.target import Target
from optpass.runtime.bundle import BundleWriter
from optpass.testing import randomised

Write = Callable[..., Path]


@pytest.mark.parametrize("target", ["program", "onnxruntime"])
def test_a_bundle_computes_what_its_program_does(
    target: str, tmp_path: Path, program: Program, write_bundle: Write
) -> None:
    from optpass.runtime.looped import program_module

    module = optpass.load(write_bundle(tmp_path / "out", program, target=target))
    sample = torch.linspace(-1, 1, 12).reshape(2, 6)
    torch.testing.assert_close(module(sample, 3)["sample"], program_module(program)(sample, 3)["sample"])


def test_a_changed_byte_is_refused_unless_asked(bundle: Path) -> None:
    path = bundle / "program" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"weights\.safetensors is not the file"):
        optpass.load(bundle)
    optpass.load(bundle, verify=False)


def test_a_moved_bundle_loads(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle, tmp_path / "elsewhere")
    assert [spec.name for spec in optpass.load(str(tmp_path / "elsewhere")).inputs] == ["sample", "timestep"]


def test_a_report_has_no_engine_to_load(tmp_path: Path, program: Program) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        writer.finish(program=program, target="onnxruntime", options={}, engines={})
    with pytest.raises(UserError, match="report and no engine"):
        optpass.load(tmp_path / "out")


def test_an_unknown_target_is_named(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    data["target"]["name"] = "onnxruntme"
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="did you mean 'onnxruntime'"):
        optpass.load(bundle)


def test_a_target_whose_package_is_missing_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(cls: type[Target]) -> list[str]:
        return ["onnxruntime"]

    monkeypatch.setattr(Target, "missing_packages", classmethod(missing))
    monkeypatch.setattr("optpass.targets.program.ProgramTarget.extra", "onnxruntime")
    with pytest.raises(UserError, match=r"pip install 'optpass\[onnxruntime\]'"):
        optpass.load(bundle)


@pytest.fixture(scope="module")
def diffusion_pipeline() -> Any:
    """diffusers' own DDPMPipeline with a tiny random UNet."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=randomised(unet.eval()), scheduler=DDPMScheduler(num_train_timesteps=100))


def test_an_unmodified_diffusers_pipeline_makes_the_same_picture(
    diffusion_pipeline: Any, tmp_path: Path, write_bundle: Write
) -> None:
    from diffusers import DiffusionPipeline

    def picture(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        made = pipe(batch_size=1, num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="np")
        return torch.from_numpy(made.images)

    eager = picture(diffusion_pipeline)
    diffusion_pipeline.save_pretrained(tmp_path / "pipeline")
    program = capture(str(tmp_path / "pipeline"), inputs={"sample": (1, 3, 8, 8)})
    out = write_bundle(tmp_path / "out", program, target="onnxruntime")
    shutil.rmtree(tmp_path / "pipeline")

    # The bundle needs nothing else: its own components, and its engine in the UNet's place.
    pipe = DiffusionPipeline.from_pretrained(out / "components", unet=None)
    pipe.unet = optpass.load(out)
    pipe.to("cpu")
    found = picture(pipe)
    assert float(eager.std()) > 0.05
    # Pixels in [0, 1]; 1e-4 is a fortieth of an 8-bit step, over three calls of the UNet.
    torch.testing.assert_close(found, eager, atol=1e-4, rtol=0)
