from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optpass.capture.methods import Taken, capture_methods
from optpass.errors import UserError
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.dimensions import FIXED, Dimension, Dimensions
from optpass.ir.program import Origin, Program
from optpass.ir.text import graph_text
from optpass.passes.swap_autoencoder import SwapAutoencoder
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.testing import randomised

CONFIGS = Path(__file__).parents[1] / "configs"
SCALE, SHIFT, TINY_SCALE, TINY_SHIFT = 0.3, 0.2, 0.5, 0.1
IMAGE, LATENTS = (1, 3, 16, 24), (1, 4, 8, 12)
BATCH = Dimensions((Dimension("batch", 1, 4, example=2),))


@pytest.fixture(scope="module")
def models():
    from diffusers import AutoencoderKL, AutoencoderTiny

    kl = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=TINY_SCALE,
        shift_factor=TINY_SHIFT,
    )
    return randomised(kl.eval()), randomised(tiny.eval())


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    found = [tmp_path_factory.mktemp(name) for name in ("kl", "tiny")]
    for model, folder in zip(models, found, strict=True):
        model.save_pretrained(folder)
    return found


@pytest.fixture(scope="module")
def program(folders):
    return program_of(folders[0], {"encode": IMAGE, "decode": LATENTS})


def program_of(folder, calls, dimensions=FIXED):
    """The Program of an autoencoder's methods, as a pipeline's component is captured."""
    taken = {method: Taken(shape, dimensions, torch.float32) for method, shape in calls.items()}
    found = capture_methods(folder, taken, structure_only=False)
    for method, graph in found.graphs.items():
        graph.signature = replace(graph.signature, method=method)
    config = {key: value for key, value in found.config.items() if not key.startswith("_")}
    return Program(found.graphs, found.weights, Origin("diffusers", class_name=found.class_name, config=config))


def step(folder):
    return Step("swap-autoencoder", SwapAutoencoder(checkpoint=folder))


def test_golden(folders):
    before = program_of(folders[0], {"decode": LATENTS})
    after, record = run_pass(before, step(folders[1]))
    lines = graph_text(after.entries["decode"], "decode").splitlines()
    assert lines[:3] == [
        "decode(z: f32[1, 4, 8, 12]):",
        "  %mul_tensor = mul.Tensor(%x, 0.6) : f32[1, 4, 8, 12]  ; (root)",
        "  %add_tensor = add.Tensor(%mul_tensor, -0.01999999999999999) : f32[1, 4, 8, 12]  ; (root)",
    ]
    assert lines[-1].startswith("  return sample=%")
    assert record.sites == ("decode:(root)",)
    assert all(name.startswith("decoder.layers.") for name in after.weights)
    assert {path for path, _ in record.files.items()} == {path.as_posix() for path in folders[1].iterdir()}


def test_both_methods_are_the_tiny_autoencoders_behind_the_others_calls(program, models, folders):
    _, tiny = models
    after, record = run_pass(program, step(folders[1]))
    assert record.sites == ("encode:(root)", "decode:(root)")
    assert after.interfaces == program.interfaces
    image, latents = torch.randn(IMAGE), torch.randn(LATENTS)
    with torch.no_grad():
        seen = (latents - SHIFT) * SCALE
        decoded = {"sample": tiny.decode(seen / TINY_SCALE + TINY_SHIFT).sample}
        seen = (tiny.encode(image).latents - TINY_SHIFT) * TINY_SCALE
        mean = seen / SCALE + SHIFT
    assert outputs_difference(decoded, program_runner(after, "decode")({"z": latents})).relative_error <= 1e-5
    [posterior] = program_runner(after, "encode")({"x": image}).values()
    torch.testing.assert_close(posterior[:, :4], mean, atol=1e-5, rtol=1e-5)
    assert (posterior[:, 4:] == -30).all()
    # What the contract measures: another function, of the same call.
    assert program_difference(program, after).relative_error > 0.01


def test_a_second_run_changes_nothing(program, folders):
    after, _ = run_pass(program, step(folders[1]))
    again, record = run_pass(after, step(folders[1]))
    assert not record.modified
    assert "already" in record.declined[0].reason
    assert again.interfaces == program.interfaces


def test_an_open_batch_stays_open(folders, models):
    before = program_of(folders[0], {"decode": ("batch", 4, 8, 12)}, BATCH)
    after, _ = run_pass(before, step(folders[1]))
    assert after.entries["decode"].inputs[0].shape == ("batch", 4, 8, 12)
    for batch in (1, 3):
        found = program_runner(after, "decode")({"z": torch.randn(batch, 4, 8, 12)})
        assert found["sample"].shape == (batch, 3, 16, 24)


def test_refusals(program, folders, tmp_path):
    kl, tiny = folders

    def refused(program, folder):
        with pytest.raises(UserError) as error:
            run_pass(program, step(folder))
        return str(error.value)

    assert "holds a AutoencoderKL, and an AutoencoderTiny is to be put in" in refused(program, kl)
    assert "holds no model of diffusers" in refused(program, tmp_path)
    assert "there is no " in refused(program, tmp_path / "taesd")
    other = replace(program, origin=replace(program.origin, class_name="UNet2DModel"))
    assert "UNet2DModel is none of AutoencoderKL" in refused(other, tiny)
    own = program.copy()
    own.entries["decode"].signature = replace(own.entries["decode"].signature, method="forward")
    assert "the model is called by forward" in refused(own, tiny)
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    assert "has no weights: with --structure-only" in refused(program, tmp_path)
    assert "decode gives sample: f32[1, 3, 64, 96] where" in refused(
        program_of(kl, {"decode": LATENTS}), of_scale_8(tmp_path / "taesd")
    )


def of_scale_8(folder):
    """TAESD itself, with random weights."""
    from diffusers import AutoencoderTiny

    AutoencoderTiny.from_config(AutoencoderTiny.load_config(CONFIGS / "taesd")).save_pretrained(folder)
    return folder
