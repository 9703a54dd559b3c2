"""The committed checkpoint: it loads without optpass, makes digits that read right, its training resumes exactly."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from optpass.errors import UserError
from optpass.evaluate.quality import Evaluator, load_classifier
from optpass.runtime.class_to_video import ClassToVideoPipeline

FOLDER = Path(__file__).parent / "moving-digits"


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """The training script, as a module."""
    spec = importlib.util.spec_from_file_location("moving_digits_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline() -> ClassToVideoPipeline:
    return ClassToVideoPipeline.load(FOLDER)


# ------------------------------------------------------------------------------------------------------- the folder


def test_the_weights_are_small_half_precision_and_finite() -> None:
    from safetensors.torch import load_file

    files = sorted(FOLDER.glob("*/*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all(), name
            if file.name != "reference.safetensors" and tensor.is_floating_point():
                assert tensor.dtype == torch.float16, name


def test_nothing_in_the_folder_can_execute_except_its_own_script() -> None:
    suffixes = {file.suffix for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert suffixes <= {".json", ".safetensors", ".md", ".py"}


def model_card_code() -> str:
    """The first Python block of the model card."""
    return (FOLDER / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]


def test_the_model_cards_loop_runs_with_diffusers_alone_and_makes_the_same_clip(
    pipeline: ClassToVideoPipeline, tmp_path: Path
) -> None:
    """In a process where `import optpass` fails, with 4 steps for the card's 20; to 1e-4 of the brightness range."""
    card = model_card_code()
    assert "set_timesteps(20)" in card
    code = "import sys\nsys.modules['optpass'] = None\n" + card.replace("set_timesteps(20)", "set_timesteps(4)")
    code += f"\nimport numpy\nnumpy.save({str(tmp_path / 'frames.npy')!r}, frames.numpy())\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER, timeout=300)
    alone = torch.from_numpy(np.load(tmp_path / "frames.npy"))
    ours = pipeline([3], seed=0, num_inference_steps=4).frames
    assert alone.shape == ours.shape == (1, 8, 1, 32, 32)
    assert (alone - ours).abs().max().item() < 1e-4


# ------------------------------------------------------------------------------------------------------- the quality


def test_the_classifier_reads_held_out_digits(train: ModuleType) -> None:
    classifier = load_classifier(FOLDER / "evaluator")
    assert train.classifier_accuracy(classifier, seed=7, count=2000) >= 0.97


def test_the_autoencoder_restores_real_clips(pipeline: ClassToVideoPipeline, train: ModuleType) -> None:
    clips = train.moving_digits(*train.digits("held-out"), 32, train.step_generator(11, 0))
    assert train.autoencoder_psnr(pipeline.vae, clips.frames) > 35


def test_latents_of_real_clips_have_the_scale_the_diffusion_was_trained_on(
    pipeline: ClassToVideoPipeline, train: ModuleType
) -> None:
    clips = train.moving_digits(*train.digits("held-out"), 64, train.step_generator(12, 0))
    latents = train.encode(pipeline.vae, clips.frames)
    assert latents.shape == (64, 8, 4, 16, 16)
    assert latents.mean().item() == pytest.approx(0, abs=0.05)
    assert latents.std().item() == pytest.approx(0.5, abs=0.05)


def test_generated_digits_read_right_and_move_as_one_object(pipeline: ClassToVideoPipeline) -> None:
    """20 clips, 12 steps; bounds well below the 500 clips of the model card, for 160 frames say less."""
    labels = torch.arange(20) % 10
    quality = Evaluator.load(FOLDER).measure(pipeline(labels, seed=50, num_inference_steps=12).frames, labels)
    assert quality.frame_accuracy >= 0.9
    assert quality.temporal_consistency >= 0.35 * quality.temporal_consistency_real


def test_the_evaluation_beside_the_weights_meets_what_the_project_asks() -> None:
    found = json.loads((FOLDER / "evaluation.json").read_text("utf-8"))
    assert (found["clips"], found["steps"]) == (500, 20)
    assert found["generated"]["frame_accuracy"] >= 0.97
    assert found["classifier_held_out_accuracy"] >= 0.97


def test_real_clips_are_nearer_to_the_reference_than_shuffled_or_mislabelled_ones(train: ModuleType) -> None:
    evaluator = Evaluator.load(FOLDER)
    clips = train.moving_digits(*train.digits("held-out"), 100, train.step_generator(13, 0))
    real = evaluator.measure(clips.frames, clips.labels)
    shuffled = evaluator.measure(clips.frames[:, torch.tensor([3, 0, 6, 1, 7, 4, 2, 5])], (clips.labels + 1) % 10)
    noisy = evaluator.measure((clips.frames + 0.3 * torch.rand_like(clips.frames)).clamp(0, 1), clips.labels)
    assert real.frame_accuracy > 0.95
    assert shuffled.frame_accuracy < 0.05
    assert real.temporal_consistency == pytest.approx(real.temporal_consistency_real, abs=0.05)
    assert shuffled.temporal_consistency < 0.3 * real.temporal_consistency
    assert real.frechet_distance < 0.5 * noisy.frechet_distance


# ------------------------------------------------------------------------------------------------------ the pipeline


def test_one_seed_gives_one_clip_whatever_is_beside_it(pipeline: ClassToVideoPipeline) -> None:
    """Equal calls agree bit for bit; other batch sizes run other kernels, so to 1e-4."""
    together = pipeline([4, 7, 1], seed=10, num_inference_steps=3).frames
    again = pipeline([4, 7, 1], seed=10, num_inference_steps=3).frames
    alone = pipeline([7], seed=11, num_inference_steps=3).frames
    listed = pipeline([1, 7], seeds=[12, 11], num_inference_steps=3).frames
    assert torch.equal(together, again)
    assert (together[1] - alone[0]).abs().max().item() < 1e-4
    assert (together[1] - listed[1]).abs().max().item() < 1e-4
    assert (together[1] - together[2]).abs().max().item() > 0.1


def test_any_callable_takes_the_unets_place(pipeline: ClassToVideoPipeline) -> None:
    calls: list[list[int]] = []

    def engine(sample, timestep, encoder_hidden_states, added_time_ids, return_dict=True):  # type: ignore[no-untyped-def]
        calls.append(list(sample.shape))
        return pipeline.unet(sample, timestep, encoder_hidden_states, added_time_ids, return_dict=return_dict)

    swapped = ClassToVideoPipeline.load(FOLDER, unet=engine)
    frames = swapped([2], seed=4, num_inference_steps=2).frames
    assert torch.equal(frames, pipeline([2], seed=4, num_inference_steps=2).frames)
    assert calls == [[2, 8, 4, 16, 16]] * 2


def test_without_guidance_the_unet_sees_each_clip_once(pipeline: ClassToVideoPipeline) -> None:
    seen: list[int] = []
    latents = pipeline(
        [5, 6],
        num_inference_steps=2,
        guidance_scale=1,
        output_type="latent",
        callback=lambda i, t, x: seen.append(len(x)),
    ).frames
    assert latents.shape == (2, 8, 4, 16, 16)
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [10]}, "from 0 to 9"),
        ({"labels": []}, "from 0 to 9"),
        ({"labels": [1], "seeds": [1, 2]}, "1 labels need 1 seeds"),
        ({"labels": [1], "output_type": "mp4"}, "one of pt, np, latent"),
        ({"labels": [1], "height": 33}, "multiples of 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    pipeline: ClassToVideoPipeline, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**arguments)


def test_a_folder_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    with pytest.raises(UserError, match="holds a StableVideoDiffusionPipeline"):
        ClassToVideoPipeline.load(tmp_path)


# ------------------------------------------------------------------------------------------------------ the training


def toy_denoiser(train: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    return train.Denoiser(train.new_unet(channels=(32, 32), heads=(2, 2)), train.new_class_encoder())


def test_resumed_training_is_uninterrupted_training_bit_for_bit(train: ModuleType, tmp_path: Path) -> None:
    parameters = train.Hyperparameters(steps=4, batch=2, warmup=2)
    torch.manual_seed(1)
    train.new_autoencoder().save_pretrained(tmp_path / "vae")
    for name, stops in (("whole", [4]), ("halves", [2, 4])):
        work = tmp_path / name
        shutil.copytree(tmp_path / "vae", work / "vae")
        for stop in stops:
            resume = (work / "diffusion.pt").exists()
            train.train_diffusion(work, parameters, resume, model=toy_denoiser(train), stop_after=stop)
    whole, halves = (torch.load(tmp_path / name / "diffusion.pt", weights_only=True) for name in ("whole", "halves"))
    assert whole["step"] == halves["step"] == 4
    for part in ("model", "average"):
        for name, value in whole[part].items():
            assert torch.equal(value, halves[part][name]), (part, name)


def test_clips_show_one_digit_inside_the_frame_at_the_speed_that_they_state(train: ModuleType) -> None:
    from optpass.evaluate.quality import centroids

    clips = train.moving_digits(*train.digits("train"), 64, train.step_generator(0, 0))
    assert clips.frames.shape == (64, 8, 1, 32, 32)
    assert clips.frames.min() >= 0
    assert clips.frames.max() <= 1
    ink = clips.frames.sum((2, 3, 4))
    assert ((ink - ink.mean(1, keepdim=True)).abs() < 0.05 * ink.mean(1, keepdim=True)).all()
    speed = centroids(clips.frames.mean(2)).diff(dim=1).norm(dim=-1).quantile(0.75, dim=1)
    assert torch.allclose(speed * train.MOTION_BUCKETS_PER_SPEED, clips.motion_bucket_id, atol=12)
